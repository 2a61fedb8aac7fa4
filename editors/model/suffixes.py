"""The ends of rows run apart from their beginnings, which stay as they are: only later tokens see a change.

Where a later token does not see earlier ones through attention alone, the layers run whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from editors.model.activations import hooked
from editors.model.caches import new_cache, sees_by_attention
from editors.model.lm import LM
from editors.model.upper_layers import UpperLayers

Suffix = tuple[Sequence[int], int]
"""A row's token ids, and the index of the token from which on something changes."""


@dataclass(frozen=True)
class CapturedEnds:
    """The ends of n rows, side by side: the token from which on a row changes is the first of its end."""

    mask: Tensor  # (n, width) 1 where an end has a token
    output: Tensor  # (n, width, d_model) the last layer's output
    column: (
        int  # where the ends begin in what the layers are run on: 0, or behind the beginnings of whole rows
    )


@torch.no_grad()
def capture_suffixes(
    upper: UpperLayers,
    rows: Sequence[Suffix],
    first: int,
    watch: Callable[[], Sequence[RemovableHandle]] = lambda: (),
) -> CapturedEnds:
    """Capture the calls of the upper layers for the rows' ends, as one batch.

    The keys and values of the tokens before an end are kept for the layers from `first` on. The hooks that `watch`
    sets see the pass that is captured alone; they are removed.
    """
    ids, mask, prefix = _aligned(upper.lm, rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if not sees_by_attention(upper.lm):
        with upper.capturing(), hooked(watch()):
            last = upper.forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return CapturedEnds(mask[:, prefix:], last[:, prefix:], prefix)
    named: dict[str, Any] = {"past_key_values": new_cache(upper.lm), "use_cache": True}
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
    own = range(
        first, len(layers) if prefix else 0
    )  # layers that share keys of others have none of their own
    kept = {i: (layers[i].keys, layers[i].values) for i in own}
    upper.use_prefix({i: (k[..., :prefix, :], v[..., :prefix, :]) for i, (k, v) in kept.items()})
    return CapturedEnds(mask[:, prefix:], last, 0)


def _aligned(lm: LM, rows: Sequence[Suffix]) -> tuple[Tensor, Tensor, int]:
    """(ids, mask, length of the beginnings): beginnings are padded on the left, ends on the right."""
    prefix = max(position for _, position in rows)
    right, right_mask = lm.pad([ids[position:] for ids, position in rows])
    if not prefix:
        return right, right_mask, 0
    left, left_mask = lm.pad([ids[:position] for ids, position in rows], left=True)
    return torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1), prefix
