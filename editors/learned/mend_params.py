"""The parameters of a MEND training, and which weights it edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import AliasChoices, Field

from editors.constants import DEFAULT_MODEL, assumed, published, tuned
from editors.errors import InvalidEdit
from editors.learned.contrast import CONTRAST
from editors.learned.networks import WeightShape
from editors.learned.training_params import TrainingParams
from editors.model.lm import LM

BENCHMARK = "python -m benchmarks.learned mend"
DEPTH = tuned(
    2 / 3,
    "share of the layers of a decoder-only model below the first edited one",
    models=DEFAULT_MODEL,
    command=BENCHMARK,
    figure="reliability, generality, locality .967/.756/.793 on check.json with 300 steps; 1.0/.778/.72 with the "
    "last three layers",
)
EDITED_LAYERS = published(
    3, "layers that are edited by default; 2 of encoder-decoder models", "MEND edits the last three MLPs"
)


class MendTraining(TrainingParams):
    """Parameters of a MEND training run."""

    layers: tuple[int, ...] | None = Field(
        None,
        description="Layers whose MLP output projections are edited. None: three layers from two thirds of the depth.",
    )
    rank: int = Field(
        assumed(256, "rank of MEND's editing networks"),
        ge=1,
        le=4096,
        description="Rank of the editing networks.",
    )
    records: int = Field(
        assumed(320, "training records of MEND at most"),
        ge=8,
        description="Training records at most. Of more, a random sample is used.",
    )
    steps: int = Field(
        tuned(
            300,
            "training steps of MEND at most",
            models=DEFAULT_MODEL,
            command=BENCHMARK,
            figure="with layers from two thirds of the depth: 1.0/.80/.813 on tune.json, .967/.756/.793 on check.json; "
            "an earlier run with 400 steps: 1.0/.733/.733 on check.json",
        ),
        ge=1,
        le=1_000_000,
        description="Training steps at most.",
    )
    group: int = Field(
        assumed(8, "edits in one micro-batch of MEND"),
        ge=1,
        le=256,
        description="Edits in one micro-batch.",
    )
    accumulate: int = Field(1, ge=1, le=64, description="Micro-batches whose gradients make one step.")
    learning_rate: float = Field(
        assumed(1e-3, "Adam's step size for MEND's editing networks"),
        gt=0,
        le=1,
        description="Adam's step size for the editing networks.",
    )
    step_learning_rate: float = Field(
        assumed(3e-2, "Adam's step size for MEND's learned step sizes"),
        gt=0,
        le=1,
        description="Adam's step size for the learned step sizes of edits.",
    )
    c_edit: float = Field(
        assumed(1.0, "weight of MEND's edit loss"),
        ge=0,
        description="Weight of the edit's own loss.",
    )
    c_loc: float = Field(
        assumed(8.0, "weight of MEND's loss on neighbours"),
        ge=0,
        description="Weight of the loss that keeps neighbours.",
    )
    c_base: float = Field(
        published(
            1.0,
            "weight of MEND's loss on ordinary text",
            "cbase in EasyEdit's configuration files of MEND",
        ),
        ge=0,
        description="Weight of the loss that keeps ordinary text.",
    )
    contrast: int = Field(
        CONTRAST,
        ge=0,
        le=12,
        description="Other subjects put into an edit's prompt; the edit is projected off their keys. 0: as published.",
    )
    paraphrases: int = Field(
        assumed(2, "paraphrases of one edit in MEND's loss"),
        ge=0,
        le=8,
        description="Paraphrases of one edit in its loss.",
    )
    neighbours: int = Field(
        assumed(2, "neighbours of one edit in MEND's loss"),
        ge=1,
        le=8,
        description="Neighbours of one edit in its loss.",
    )
    evaluate_every: int = Field(80, ge=1, description="Steps between validations (and checkpoints).")
    patience: int = Field(
        assumed(5, "validations without a better one after which MEND's training stops"),
        ge=1,
        description="Validations without a better one after which the training stops.",
    )
    lower_precision: bool = Field(
        True,
        validation_alias=AliasChoices("lower_precision", "rough"),  # "rough" until 0.1.0
        description="Run the model in bfloat16 while training where the processor is faster for it. Edits are made in "
        "the model's own precision.",
    )
    cache_mb: int = Field(900, ge=0, description="Memory in MB for hidden states that are computed once.")
    checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass (less memory)."
    )


def target_weights(lm: LM, layers: Sequence[int] | None) -> list[str]:
    """Names of the weights MEND edits: MLP output projections of some layers, in encoder and decoder alike.

    The paper takes the last three layers. Here, three layers from two thirds of the depth change other subjects
    less. Of an encoder-decoder model the last two are taken.

    Raises InvalidEdit when `layers` is empty or names a layer that does not exist.
    """
    if layers is None:
        n = lm.n_layers
        if lm.arch.encoder_layers is not None:
            start, count = max(0, n - EDITED_LAYERS + 1), EDITED_LAYERS - 1
        else:
            start, count = max(0, min(round(DEPTH * n), n - EDITED_LAYERS)), EDITED_LAYERS
        layers = range(start, min(n, start + count))
    names = [lm.mlp_out(i) for i in sorted(set(layers))]
    if not names:
        raise InvalidEdit("params.layers is empty; name at least one layer")
    if lm.arch.encoder_layers is not None:
        names = [
            f"{lm.arch.encoder_layers}.{i}.{lm.arch.encoder_mlp_out}.weight" for i in sorted(set(layers))
        ] + names
    return names


def published_values(lm: LM) -> dict[str, Any]:
    """The paper's layers, the last three, without `contrast`."""
    return {"layers": tuple(range(max(0, lm.n_layers - EDITED_LAYERS), lm.n_layers)), "contrast": 0}


def shapes_of(lm: LM, names: Sequence[str]) -> list[WeightShape]:
    """Names and shapes of weights, as `Mend` takes them."""
    return [WeightShape(name, *lm.shape(name)) for name in names]
