"""What a module reads at the later tokens of texts; what the texts begin with alike is read once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from editors.closed_form.keys import CHUNK, inputs_of
from editors.model.beginnings import read_beginnings
from editors.model.lm import LM


@torch.no_grad()
def read_later_inputs(lm: LM, module: nn.Module, rows: Sequence[tuple[Sequence[int], int]]) -> list[Tensor]:
    """The inputs (tokens, d) of a module for each row from a token on, float32 on the CPU.

    `rows` are token ids and the index of the first token that is read. What rows begin with alike is read once.
    """
    longer = _extensions([ids for ids, _ in rows])
    first = {i: min(start for (_, start), j in zip(rows, longer, strict=True) if j == i) for i in set(longer)}
    order = sorted(first, key=lambda i: len(rows[i][0]))
    read: dict[int, Tensor] = {}
    for at in range(0, len(order), CHUNK):
        some = order[at : at + CHUNK]
        texts = [list(rows[i][0]) for i in some]
        begun = read_beginnings(lm, texts, 0, [len(rows[i][0]) - first[i] for i in some])
        inputs = inputs_of(lm, {0: module}, texts, begun)[0]
        for i, each in zip(some, inputs, strict=True):
            read[i] = each[first[i] - len(rows[i][0]) :].float().cpu()
    return [
        read[j][start - first[j] : len(ids) - first[j]] for (ids, start), j in zip(rows, longer, strict=True)
    ]


def _extensions(rows: Sequence[Sequence[int]]) -> list[int]:
    """For each row the longest one that begins with it, which may be itself: an input depends on nothing after it."""
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]), reverse=True)
    found = list(range(len(rows)))
    for before, i in pairwise(order):  # a row comes right after those that begin with it
        longest = rows[found[before]]
        if tuple(longest[: len(rows[i])]) == tuple(rows[i]):
            found[i] = found[before]
    return found


@dataclass(frozen=True)
class LaterInputs:
    """Texts in token ids, each with the first token that was read, and the inputs (tokens, d) from there on."""

    rows: Sequence[tuple[Sequence[int], int]]
    inputs: Sequence[Tensor]

    @classmethod
    def read(cls, lm: LM, module: nn.Module, rows: Sequence[tuple[Sequence[int], int]]) -> LaterInputs:
        """What a module reads in these texts."""
        return cls(rows, read_later_inputs(lm, module, rows))

    def joined_with(self, other: LaterInputs) -> LaterInputs:
        """These and others."""
        return LaterInputs([*self.rows, *other.rows], [*self.inputs, *other.inputs])

    def without(self, beginnings: Collection[Sequence[int]]) -> Tensor:
        """All inputs (tokens, d) but those at the end of one of these token sequences."""
        left_out = {tuple(ids) for ids in beginnings}
        kept = [
            each
            for (ids, first), inputs in zip(self.rows, self.inputs, strict=True)
            for at, each in enumerate(inputs, first)
            if tuple(ids[: at + 1]) not in left_out
        ]
        return torch.stack(kept)
