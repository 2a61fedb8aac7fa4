"""Weights that two modules share, such as tied embeddings, and adapters of one of the two."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from editors.finetune.adapter import AdapterPatch, Lora, Piece
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch


def shares_weight(lm: LM, name: str) -> bool:
    """True when another module has the same weight, as a tied language-model head has that of the embeddings."""
    if name in lm.quantised or name in lm.experts:
        return False
    own = lm.module(name).get_parameter(name.rpartition(".")[2])
    return sum(p is own for _, p in lm.model.named_parameters(remove_duplicate=False)) > 1


def off_shared_weights(lm: LM, patch: Patch) -> Patch:
    """The patch, acting beside the weights if it changes a module that shares its weight with another.

    Until 0.1.0 such a change was written into the shared weight, or could not be taken back.
    """
    if not isinstance(patch, WeightPatch) or not any(_is_shared(lm, name) for name in patch.deltas):
        return patch
    pieces: dict[str, Piece] = {}
    for name, delta in patch.deltas.items():
        if not isinstance(delta, LowRank) or not isinstance(lm.module(name), nn.Linear | Conv1D):
            return patch  # the host refuses it and names it
        pieces[name] = Lora(delta.left, delta.right)
    return AdapterPatch([pieces], extra=patch.extra, info=patch.info)


def _is_shared(lm: LM, name: str) -> bool:
    try:
        return shares_weight(lm, name)
    except AttributeError:  # a weight that this model does not have
        return False
