"""Prompts that begin alike (a chat template, a fact in front): their common beginning is read once.

The keys and values of a common beginning are computed for one row, copied to every prompt that begins with it, and the
prompts are read on from there. Positions and attention masks are those of the whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from editors.model.caches import new_cache, sees_by_attention
from editors.model.spoken_model import SpokenModel

WORTH_SHARING = 8
"""Least number of common tokens for which a beginning is read on its own."""
LEAST_SAVED = 1 / 4
"""Share of the tokens, padding included, that must be saved; a second forward pass has a cost of its own."""


@dataclass(frozen=True)
class Begun:
    """Prompts whose common beginnings were read. Shapes: n prompts, t tokens with padding."""

    ids: Tensor  # (n, t)
    mask: Tensor  # (n, t) 1 where a token counts
    past: Any  # keys and values of the beginnings, one row for each prompt
    columns: int  # of the beginnings; what is left to read is `ids[:, columns:]`


def read_beginnings(
    lm: SpokenModel, rows: Sequence[Sequence[int]], new_tokens: int, last: Sequence[int] | None = None
) -> Begun | None:
    """Read the common beginnings of rows of token ids; None where that saves little or the model cannot do it.

    `new_tokens` may be generated after each row. At least the `last` tokens of each row, or one, are left to read.
    A model with hooks reads every prompt whole, since hooks may count columns from the beginning of a row.
    """
    lengths = shared_lengths(rows, last)
    if lengths is None or not attends_to_all(lm, 2 * max(len(row) for row in rows) + new_tokens):
        return None
    beginnings = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    order = {beginning: n for n, beginning in enumerate(dict.fromkeys(beginnings))}
    begun, begun_mask = lm.pad([list(beginning) for beginning in order], left=True)
    past = _keys_and_values(lm, begun, begun_mask)
    of = torch.tensor([order[beginning] for beginning in beginnings], device=begun.device)
    past.batch_select_indices(of)
    rest, rest_mask = lm.pad([list(row[n:]) for row, n in zip(rows, lengths, strict=True)], left=True)
    ids, masks = torch.cat([begun[of], rest], 1), torch.cat([begun_mask[of], rest_mask], 1)
    return Begun(ids, masks, past, begun.shape[1])


def shared_lengths(rows: Sequence[Sequence[int]], last: Sequence[int] | None = None) -> list[int] | None:
    """How many tokens of each row are read as a beginning; None where that saves too little.

    Rows are put in order, and neighbours join while a group saves more with them than without. A row that begins like
    no other has a beginning of its own, as long as the others', so that its rest is short too. At least the `last`
    tokens of each row, or one, are no beginning.
    """
    if len(rows) < 2:
        return None
    lengths: dict[int, int] = {}
    for group in _groups(rows):
        common = common_beginning([rows[i] for i in group])
        lengths |= dict.fromkeys(group, common if len(group) > 1 else 0)
    longest = max(lengths.values())
    if not longest:
        return None
    ends = last or [1] * len(rows)
    lengths = {i: min(n or longest, len(rows[i]) - ends[i]) for i, n in lengths.items()}
    if min(lengths.values()) < 1:
        return None
    beginnings = {tuple(rows[i][:n]) for i, n in lengths.items()}
    rest = max(len(rows[i]) - n for i, n in lengths.items())
    shared = len(beginnings) * max(lengths.values()) + len(rows) * rest
    whole = len(rows) * max(len(row) for row in rows)
    return [lengths[i] for i in range(len(rows))] if shared <= (1 - LEAST_SAVED) * whole else None


def _groups(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    groups: list[list[int]] = []
    common = 0
    for i in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        if groups:
            group = groups[-1]
            joined = common_beginning([rows[group[0]], rows[i]])  # in order: as with all between them
            if joined >= WORTH_SHARING and len(group) * joined >= (len(group) - 1) * common:
                group.append(i)
                common = joined
                continue
        groups.append([i])
        common = len(rows[i])
    return groups


def common_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; each keeps one at least for itself."""
    shortest = min(len(row) for row in rows) - 1
    columns = enumerate(zip(*rows, strict=False))
    return min(shortest, next((n for n, tokens in columns if len(set(tokens)) > 1), shortest))


def attends_to_all(lm: SpokenModel, columns: int) -> bool:
    """Whether padding anywhere is harmless: attention only, with all columns in its window, and no hooks."""
    if not sees_by_attention(lm) or any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()):
        return False
    config = lm.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return window is None or columns < window


def _keys_and_values(lm: SpokenModel, ids: Tensor, mask: Tensor) -> Any:
    """The cache after reading left-padded rows (n, t)."""
    cache = new_cache(lm)
    read_on(lm, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
    return cache


def read_on(lm: SpokenModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
    """The model's output for the columns after those of the cache, which grows by them; logits of the last one alone.

    Shapes: ids and positions (n, columns to read), mask (n, all columns).
    """
    inputs = {"position_ids": positions, "logits_to_keep": 1}
    extra = {name: value for name, value in inputs.items() if name in inputs_of(type(lm.model).forward)}
    return lm.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)


@lru_cache
def inputs_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)
