"""IA3: learned factors for the hidden units of MLPs, on the PEFT library's layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from pydantic import Field

from editors.constants import assumed, limit
from editors.finetune.adapter import AdapterPatch, Ia3, patch_rows
from editors.finetune.peft_layers import ADAPTER, PeftEditor, PeftLayer, attached, refuse_imported
from editors.finetune.train_params import TrainParams
from editors.model.lm import LM
from editors.patch import Patch, cpu_float

DEPTHS = assumed(
    tuple(0.1 + 0.05 * i for i in range(9)),
    "depths of the layers that ia3 adapts",
    "one factor per unit changes little, so many layers are needed; no comparison is known",
)


class Ia3Params(TrainParams):
    """Parameters of IA3."""

    lr: float = Field(
        assumed(3e-2, "ia3's step size"),
        gt=0,
        le=10,
        description="Adam's step size.",
    )
    max_steps: int = Field(
        limit(
            60,
            "most steps of ia3",
            "time: then the change stays as it is, and the report says what it achieves; mostly it stops before",
        ),
        ge=1,
        le=1000,
        description="Most optimisation steps; it stops early.",
    )


class Ia3Editor(PeftEditor[Ia3Params]):
    name = "ia3"
    at_subject = False  # the base layer gets scaled inputs, so its unchanged output is not available
    title = "Learned scaling of activations (IA3)"
    description = (
        "Learns one factor for each hidden unit of several MLPs; the smallest of the adapters, and the weakest. Acts "
        "beside the weights."
    )
    source = "Liu et al., NeurIPS 2022, arXiv 2205.05638"
    when = "A baseline, where patches must be tiny and weights must not change."
    cost = "As lora, over all layers from the first adapted one on."
    kind = "adapter"
    params = Ia3Params
    depths = DEPTHS

    def _patch(self, rows: Sequence[Any], params: Ia3Params) -> Patch:
        """One vector of factors per edit and layer."""
        return AdapterPatch(rows)

    def _with_earlier(self, lm: LM, rows: Sequence[Any], params: Ia3Params) -> AbstractContextManager[Any]:
        return attached(lm, rows)

    def _make_layer(self, lm: LM, name: str, params: Ia3Params) -> PeftLayer:
        from peft import IA3Config
        from peft.tuners.ia3.layer import Linear

        base = lm.module(name)
        config = IA3Config(fan_in_fan_out=lm.is_transposed(name))
        return PeftLayer(Linear(base, ADAPTER, config, is_feedforward=True), base)

    def _result(self, layer: Any, params: Ia3Params) -> Ia3:
        return Ia3(cpu_float(layer.ia3_l[ADAPTER]).flatten())

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The factors of these edits only."""
        refuse_imported(patch)
        return patch_rows(patch, rows)
