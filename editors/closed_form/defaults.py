"""Defaults of the closed-form methods that follow from a model's shape."""

from __future__ import annotations

from collections.abc import Sequence

from editors.constants import from_shape, published
from editors.errors import InvalidEdit
from editors.model.caches import last_read, unread
from editors.model.lm import LM

DEFAULT_DEPTH = published(
    1 / 6,
    "where one-layer methods edit, as a share of the layers",
    "the layers of the papers: 5 of 28 in GPT-J, 5 of 32 in Llama",
)


@from_shape(
    "round(DEFAULT_DEPTH * layers), from 1 to the last layer that later tokens read (layers - 2 in most models)",
    "the layer that one-layer methods edit",
)
def default_layer(lm: LM) -> int:
    """Where one-layer methods edit by default."""
    chosen = max(1, min(lm.n_layers - 2, round(DEFAULT_DEPTH * lm.n_layers)))
    return max(0, last_read(lm)) if unread(lm, chosen) else chosen


def refuse_unread(lm: LM, layers: Sequence[int]) -> None:
    """Raise InvalidEdit for layers whose change at the subject no later token would see."""
    last = last_read(lm)
    if bad := [layer for layer in layers if unread(lm, layer)]:
        raise InvalidEdit(
            f"layer {bad[-1]} cannot carry a fact here: the upper layers of this {lm.arch.family} model take their "
            f"keys from lower ones, so what a layer above {last} writes at the subject never reaches the answer. "
            f"Name a layer from 0 to {last}, or use method ft, lora, grace or t_patcher"
        )


def existing_layer(lm: LM, layer: int | None, default: int) -> int:
    """The layer that is given, or the default one. Raises InvalidEdit for one that the model does not have."""
    chosen = default if layer is None else layer
    if chosen >= lm.n_layers:
        raise InvalidEdit(
            f"params.layer {chosen} does not exist; this model has layers 0 to {lm.n_layers - 1}"
        )
    return chosen


def seq2seq_refusal(lm: LM, name: str) -> str | None:
    if lm.is_seq2seq:
        return (
            f"{name} reads a fact's key at the subject's last token of a decoder-only model; {lm.arch.family} is an "
            "encoder-decoder model. Use ft, lora, mend or serac instead."
        )
    return None
