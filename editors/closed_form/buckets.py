"""Varied rows of similar length, run together: a statement has five tokens after its subject, a chat answer twenty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from editors.closed_form.varied_rows import VariedRow, VariedRows
from editors.model.lm import LM

LONGER = 1.5  # times the shortest row of a bucket, and EXTRA tokens: longer ones go into the next bucket
EXTRA = 2


class Buckets:
    """`VariedRows` for rows of any lengths. Callers see the rows in their own order.

    `key` (n, d_in), `value` (n, d_out) and `state` (n, d_model) are those of `VariedRows`.
    """

    def __init__(
        self,
        lm: LM,
        layer: int,
        rows: Sequence[VariedRow],
        dtype: torch.dtype | None = None,
        *,
        attention: bool = False,
    ) -> None:
        self._members = list(_by_length(rows))
        self._parts = [
            VariedRows(lm, layer, [rows[i] for i in members], dtype, attention=attention)
            for members in self._members
        ]
        back = torch.tensor(_inverse([i for members in self._members for i in members]))
        self.key, self.value, self.state = (
            torch.cat([getattr(part, name) for part in self._parts])[back.to(lm.device)]
            for name in ("key", "value", "state")
        )

    def answer_by(self, reads: Tensor) -> None:
        """Let every token of a row from the varied one on change by `reads` (n, d_in) times its key: see VariedRows."""
        for part, members in zip(self._parts, self._members, strict=True):
            part.answer_by(reads[members])

    def __call__(self, delta: Tensor, attention: Tensor | None = None) -> list[Tensor]:
        """The residual stream after the last layer, (row's bucket, longest suffix, d_model) for every bucket."""
        return [
            part(delta[members], None if attention is None else attention[members])
            for part, members in zip(self._parts, self._members, strict=True)
        ]

    def states(self, hidden: Sequence[Tensor], rows: Tensor, cols: Tensor) -> Tensor:
        """The states (picks, d_model) at some columns of some rows."""
        where = {i: (b, j) for b, members in enumerate(self._members) for j, i in enumerate(members)}
        place = torch.tensor([where[i] for i in rows.tolist()], device=cols.device)  # (picks, 2)
        picked = [torch.nonzero(place[:, 0] == b)[:, 0] for b in range(len(hidden))]
        found = [h[place[at, 1], cols[at]] for h, at in zip(hidden, picked, strict=True)]
        order = torch.cat(picked)
        return torch.cat(found)[torch.argsort(order)]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some states, in the precision of the search."""
        return self._parts[0].head(hidden)

    def select(self, keep: Sequence[int]) -> None:
        """Keep only these rows (indices into the present ones)."""
        new = {old: i for i, old in enumerate(keep)}
        parts, kept = [], []
        for part, members in zip(self._parts, self._members, strict=True):
            mine = [j for j, i in enumerate(members) if i in new]
            if mine:
                part.select(mine)
                parts.append(part)
                kept.append([new[members[j]] for j in mine])
        self._parts, self._members = parts, kept
        index = torch.tensor(list(keep), device=self.key.device)
        self.key, self.value, self.state = self.key[index], self.value[index], self.state[index]


def _by_length(rows: Sequence[VariedRow]) -> Iterator[list[int]]:
    """The rows' indices, grouped by similar length from the varied token on, the shortest first."""
    lengths = [len(row.ids) - row.position for row in rows]
    bucket: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (lengths[i], i)):
        if bucket and lengths[i] > LONGER * lengths[bucket[0]] + EXTRA:
            yield sorted(bucket)
            bucket = []
        bucket.append(i)
    yield sorted(bucket)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda j: order[j])
