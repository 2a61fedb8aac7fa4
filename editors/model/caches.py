"""What a decoder-only model keeps of the tokens it has read, so that it can read on.

Attention keeps keys and values of each token. They can be cut at any token, and rows of several lengths stand side by
side with empty columns on the left. A recurrent layer (a state-space layer, a gated delta rule, a short convolution)
keeps states of a fixed size that hold all tokens read so far: they cannot be cut, and have no columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from editors.model.spoken_model import SpokenModel

OFFSETS = "rope_deltas"
"""What models that read images call the offsets of positions that they keep."""
ATTENTION = {"full_attention", "sliding_attention"}


def sees_by_attention(lm: SpokenModel) -> bool:
    """Whether a later token sees an earlier one through attention alone, so that keys and values stand for it.

    Then the end of a row can be run apart from its beginning. Where it is False, rows are run whole.
    """
    return not lm.is_seq2seq and _kinds(lm) <= ATTENTION


def last_read(lm: SpokenModel) -> int:
    """The last layer whose writing at a token is read by later tokens: the one below the last that makes keys.

    In most models every layer makes its own keys, so it is the last layer but one. Where the upper layers take the
    keys of lower ones (Gemma 4 E2B and E4B, Gemma 3n), what they write at a token stays at that token.
    """
    modes = getattr(lm.model.config.get_text_config(), "kv_sharing_modes", None)
    if not modes:
        return lm.n_layers - 2
    return max(i for i, mode in enumerate(modes) if mode is None or not mode.startswith("reuse")) - 1


def shares_keys(lm: SpokenModel) -> bool:
    """Whether the upper layers take the keys of lower ones."""
    return last_read(lm) < lm.n_layers - 2


def unread(lm: SpokenModel, layer: int) -> bool:
    """Whether what a layer writes at a token is lost to later ones because the layers above take the keys of others."""
    return shares_keys(lm) and layer > last_read(lm)


def _kinds(lm: SpokenModel) -> set[str]:
    config = lm.model.config.get_text_config()
    return set(getattr(config, "layer_types", None) or ["full_attention"])


def new_cache(lm: SpokenModel) -> Any:
    """An empty cache for the model, in which windowed layers keep all columns too."""
    if sees_by_attention(lm):
        return DynamicCache()
    cache = DynamicCache(config=lm.model.config.get_text_config())
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer for layer in cache.layers
    ]
    return cache


def kept_of(lm: SpokenModel, out: Any) -> Any:
    """The cache with the prompts in what `generate` gave; None where an encoder has read them."""
    return out.past_key_values if lm.decoder_reads_prompt else None


def generate(lm: SpokenModel, **call: Any) -> Any:
    """What transformers' `generate` gives. What a model keeps of the batch beside its cache is forgotten at the end.

    Qwen3.5 with images keeps the offsets of the rows' positions, and would add those of one batch to the next.
    """
    try:
        return lm.model.generate(**call)
    finally:
        if hasattr(lm.base_model, OFFSETS):
            setattr(lm.base_model, OFFSETS, None)


def join(cache: Any, other: Any, width: int) -> None:
    """Put the rows of `other` below those of `cache`; keys and values get empty columns on the left, up to `width`."""
    for mine, more in zip(cache.layers, other.layers, strict=True):
        if _has_keys(mine):
            mine.keys = torch.cat([_widened(mine.keys, width), _widened(more.keys, width)])
            mine.values = torch.cat([_widened(mine.values, width), _widened(more.values, width)])
        for states, others in zip(_states(mine), _states(more), strict=True):
            for i, state in states.items():
                other_state = others[i]
                if state is not None and other_state is not None:
                    states[i] = torch.cat([state, other_state])


def keep_rows(cache: Any, rows: Sequence[int], start: int = 0) -> None:
    """Keep only these rows, and of keys and values the columns from `start` on."""
    index = torch.tensor(rows)
    for layer in cache.layers:
        if _has_keys(layer):
            at = index.to(layer.keys.device)
            layer.keys = layer.keys[:, :, start:].index_select(0, at)
            layer.values = layer.values[:, :, start:].index_select(0, at)
        for states in _states(layer):
            for i, state in states.items():
                states[i] = None if state is None else state[index.to(state.device)]


def _has_keys(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None


def _states(layer: Any) -> list[dict[int, Tensor | None]]:
    """The states of a recurrent layer, by their numbers: those of its convolution, and those of its recurrence."""
    return [getattr(layer, name) for name in ("conv_states", "recurrent_states") if hasattr(layer, name)]


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values (n, heads, columns, d_head) with empty columns on the left, up to `width`."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
