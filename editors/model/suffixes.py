"""The ends of rows run apart from their beginnings, which stay as they are: only later tokens see a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from editors.model.activations import hooked
from editors.model.lm import LM
from editors.model.upper_layers import UpperLayers

Suffix = tuple[Sequence[int], int]
"""A row's token ids, and the index of the token from which on something changes."""


def can_run_suffixes(lm: LM) -> bool:
    """Whether a later token sees an earlier one through attention alone, so that keys and values stand for it."""
    kinds = getattr(lm.model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return not lm.is_seq2seq and set(kinds) <= {"full_attention", "sliding_attention"}


@torch.no_grad()
def capture_suffixes(
    upper: UpperLayers,
    rows: Sequence[Suffix],
    first: int,
    watch: Callable[[], Sequence[RemovableHandle]] = lambda: (),
) -> tuple[Tensor, Tensor]:
    """Capture the calls of the upper layers for the rows' ends, as one batch.

    Returns its mask (n, width) and the last layer's output (n, width, d_model).

    Column 0 of each row is the token from which on it changes. The keys and values of the tokens before it are kept
    for the layers from `first` on. The hooks that `watch` sets see the pass over the ends alone; they are removed.
    """
    ids, mask, prefix = _aligned(upper.lm, rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    named: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": True}
    if prefix:
        upper.forward(
            input_ids=ids[:, :prefix],
            attention_mask=mask[:, :prefix],
            position_ids=positions[:, :prefix],
            **named,
        )
    with upper.capturing(), hooked(watch()):
        last = upper.forward(
            input_ids=ids[:, prefix:], attention_mask=mask, position_ids=positions[:, prefix:], **named
        )
    layers = named["past_key_values"].layers
    kept = {i: (layers[i].keys, layers[i].values) for i in range(first, upper.lm.n_layers) if prefix}
    upper.use_prefix({i: (k[..., :prefix, :], v[..., :prefix, :]) for i, (k, v) in kept.items()})
    return mask[:, prefix:], last


def _aligned(lm: LM, rows: Sequence[Suffix]) -> tuple[Tensor, Tensor, int]:
    """(ids, mask, length of the beginnings): beginnings are padded on the left, ends on the right."""
    prefix = max(position for _, position in rows)
    right, right_mask = lm.pad([ids[position:] for ids, position in rows])
    if not prefix:
        return right, right_mask, 0
    left, left_mask = lm.pad([ids[:position] for ids, position in rows], left=True)
    return torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1), prefix
