"""LoRA with its variants rsLoRA and DoRA, on the PEFT library's layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import Field

from editors.errors import InvalidEdit
from editors.finetune.adapter import AdapterPatch, Dora, patch_rows
from editors.finetune.key_directions import RANK, RATE, RIGHT_FACTOR, STRIDE, ModuleKeys, key_directions
from editors.finetune.peft_layers import (
    ADAPTER,
    PeftEditor,
    PeftLayer,
    attached,
    low_rank_patch,
    low_rank_rows,
    refuse_imported,
)
from editors.finetune.train_params import EARLY, TrainParams
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float


class LoraParams(TrainParams):
    """Parameters of LoRA."""

    rank: int = Field(RANK, ge=1, le=256, description="Rank of the change of each weight.")
    alpha: float = Field(8.0, gt=0, le=4096, description="Scaling: alpha / rank.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    dora: bool = Field(
        False,
        description="Train direction and magnitude separately (DoRA). Acts beside the weights; export it as a bundle.",
    )
    lr: float = Field(
        RATE,
        gt=0,
        le=10,
        description="Adam's step size of lora_B; lora_A's is a sixteenth.",
    )
    stride: float = Field(
        STRIDE,
        gt=0,
        le=10,
        description="How far one step moves the adapted output, in units of the output's own size.",
    )


class LoraEditor(PeftEditor[LoraParams]):
    name = "lora"
    lora_a_factor = RIGHT_FACTOR
    title = "Low-rank adaptation (LoRA, rsLoRA, DoRA)"
    description = (
        "Trains a low-rank change of a few MLP projections on the fact for a few steps, while the predictions for "
        "other subjects in the same sentence and on unrelated text are preserved. The change is then added to the "
        "weights."
    )
    source = "Hu et al., ICLR 2022, arXiv 2106.09685; rsLoRA arXiv 2312.03732; DoRA arXiv 2402.09353"
    when = "Facts that rome refuses or misses (long answers, questions, encoder-decoder models)."
    cost = "Some ten passes over a dozen short sentences per fact; a small patch."
    params = LoraParams
    depths = EARLY
    takes_experts = True

    def resolve(self, lm: LM, params: LoraParams) -> LoraParams:
        if params.dora and lm.edits_experts:
            raise InvalidEdit(
                "params.dora: DoRA scales the rows of one matrix, and the experts of this model are many; leave it out"
            )
        return super().resolve(lm, params)

    def _patch(self, rows: Sequence[Any], params: LoraParams) -> Patch:
        """One low-rank change (or, for DoRA, one adapter) per edit and layer."""
        return AdapterPatch(rows) if params.dora else low_rank_patch(rows)

    def _with_earlier(self, lm: LM, rows: Sequence[Any], params: LoraParams) -> AbstractContextManager[Any]:
        return attached(lm, rows) if params.dora else super()._with_earlier(lm, rows, params)

    def _make_layer(self, lm: LM, name: str, params: LoraParams) -> PeftLayer:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        alpha: Any = params.alpha
        config = LoraConfig(
            r=params.rank,
            lora_alpha=alpha,
            use_rslora=params.rslora,
            use_dora=params.dora,
            fan_in_fan_out=lm.is_transposed(name),
        )
        base = lm.module(name)
        layer = Linear(
            base,
            ADAPTER,
            config,
            r=params.rank,
            lora_alpha=alpha,
            is_target_conv_1d_layer=lm.is_transposed(name),
        )
        return PeftLayer(layer, base)

    def _initialise(self, layer: Any, keys: ModuleKeys, params: LoraParams) -> None:
        """Start lora_A at the directions that separate the subject's keys, so that lora_B learns the value.

        It is scaled so that one step of Adam moves the output by `stride` times its own size.
        """
        directions = key_directions(keys, params.rank)
        scale = params.stride * keys.output_rms / (params.lr * layer.scaling[ADAPTER])
        with torch.no_grad():
            weight = layer.lora_A[ADAPTER].weight
            weight.zero_()
            weight[: len(directions)] = (scale * directions).to(weight.device)

    def _result(self, layer: Any, params: LoraParams) -> LowRank | Dora:
        left = cpu_float(layer.lora_B[ADAPTER].weight) * layer.scaling[ADAPTER]
        right = cpu_float(layer.lora_A[ADAPTER].weight)
        if params.dora:
            return Dora(left, right, cpu_float(layer.lora_magnitude_vector[ADAPTER].weight))
        return LowRank(left, right)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The factors (or the adapters) of these edits only."""
        refuse_imported(patch)
        return low_rank_rows(patch, rows) if isinstance(patch, WeightPatch) else patch_rows(patch, rows)
