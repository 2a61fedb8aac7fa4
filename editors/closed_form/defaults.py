"""Defaults of the closed-form methods that follow from a model's shape."""

from __future__ import annotations

from editors.constants import from_shape, published
from editors.errors import InvalidEdit
from editors.model.lm import LM

DEFAULT_DEPTH = published(
    1 / 6,
    "where one-layer methods edit, as a share of the layers",
    "the layers of the papers: 5 of 28 in GPT-J, 5 of 32 in Llama",
)


@from_shape("round(DEFAULT_DEPTH * layers), from 1 to layers - 2", "the layer that one-layer methods edit")
def default_layer(lm: LM) -> int:
    """Where one-layer methods edit by default."""
    return max(1, min(lm.n_layers - 2, round(DEFAULT_DEPTH * lm.n_layers)))


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
