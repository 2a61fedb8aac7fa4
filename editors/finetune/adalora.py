"""AdaLoRA: low-rank adaptation that shares its rank among the layers, on the PEFT library's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.constants import assumed, published
from editors.finetune.peft_layers import ADAPTER, PeftEditor, PeftLayer, low_rank_patch, low_rank_rows
from editors.finetune.train_params import TrainParams
from editors.finetune.training import LoopHooks
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, cpu_float

DEPTHS = assumed(
    (0.1, 0.15, 0.2, 0.3),
    "depths of the layers that adalora shares its rank among",
    "around rome's default layer; no comparison is known",
)


class AdaLoraParams(TrainParams):
    """Parameters of AdaLoRA."""

    initial_rank: int = Field(8, ge=2, le=256, description="Rank each weight starts with.")
    rank: int = Field(4, ge=1, le=255, description="Mean rank over the weights at the end.")
    orthogonality: float = Field(
        published(
            0.1,
            "weight of adalora's orthogonality term",
            "gamma in Zhang et al., ICLR 2023, arXiv 2303.10512, the tables of hyperparameters; peft's own "
            "default is 0.5",
        ),
        ge=0,
        le=100,
        description="Weight of the orthogonality of the factors.",
    )
    lr: float = Field(
        assumed(2e-2, "adalora's step size"),
        gt=0,
        le=10,
        description="Adam's step size.",
    )


class AdaLora(PeftEditor[AdaLoraParams]):
    name = "adalora"
    title = "Adaptive low-rank adaptation (AdaLoRA)"
    description = (
        "Trains changes of the form P diag(E) Q on several MLP projections and gives the most important ones the "
        "highest rank. The changes are then added to the weights."
    )
    source = "Zhang et al., ICLR 2023, arXiv 2303.10512"
    when = "When it is not known which layers should change; lora is cheaper."
    cost = "As lora, over more layers."
    params = AdaLoraParams
    depths = DEPTHS

    def _patch(self, rows: Sequence[Any], params: AdaLoraParams) -> Patch:
        """One low-rank change per edit and layer; triplets that were pruned are left out."""
        return low_rank_patch(rows)

    def _config(self, params: AdaLoraParams) -> Any:
        from peft import AdaLoraConfig

        total = params.max_steps
        return AdaLoraConfig(
            init_r=params.initial_rank,
            target_r=min(params.rank, params.initial_rank - 1),
            tinit=max(1, total // 10),
            tfinal=max(1, total // 2),
            deltaT=1,
            total_step=max(4, total),
            lora_alpha=params.initial_rank,
            orth_reg_weight=params.orthogonality,
        )

    def _make_layer(self, lm: LM, name: str, params: AdaLoraParams) -> PeftLayer:
        from peft.tuners.adalora.layer import SVDLinear

        base, config = lm.module(name), self._config(params)
        config.fan_in_fan_out = lm.is_transposed(name)
        layer = SVDLinear(base, ADAPTER, config, r=params.initial_rank, lora_alpha=params.initial_rank)
        return PeftLayer(layer, base)

    def _loop_hooks(self, layers: nn.ModuleList, params: AdaLoraParams) -> LoopHooks:
        """The paper's schedule: the rank is cut step by step, then it stays and training goes on."""
        from peft.tuners.adalora.layer import RankAllocator

        config = self._config(params)
        allocator: Any = _untyped(RankAllocator)(layers, config, ADAPTER)
        last_cut = config.total_step - config.tfinal
        pattern: dict[str, list[bool]] = {}

        def after_step(step: int) -> None:
            if step + 1 < last_cut:
                _, ranks = allocator.update_and_allocate(layers, step + 1)
                pattern.update(ranks or {})
            elif pattern:
                allocator.mask_using_rank_pattern(layers, pattern)

        return LoopHooks(
            penalty=lambda: params.orthogonality * _orthogonality(layers) / (2 * len(layers)),
            after_step=after_step,
            may_stop=lambda step: step >= min(last_cut, params.max_steps),
        )

    def _result(self, layer: Any, params: AdaLoraParams) -> LowRank:
        """scaling / (rank + 1e-5) * B diag(E) A, as in the library's forward pass."""
        e = cpu_float(layer.lora_E[ADAPTER])[:, 0]
        scale = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
        used = e.nonzero()[:, 0] if bool(e.any()) else torch.tensor([0])
        left = cpu_float(layer.lora_B[ADAPTER])[:, used] * (e[used] * scale)
        return LowRank(left.contiguous(), cpu_float(layer.lora_A[ADAPTER])[used].contiguous())

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The factors of these edits only."""
        return low_rank_rows(patch, rows)


def _orthogonality(layers: nn.ModuleList) -> Tensor:
    """Sum over both factors of all layers of ||P^T P - I||, not squared, as in the library."""
    total = torch.zeros(())
    for layer in map(_untyped, layers):
        for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].t()):
            gram = side @ side.t()
            total = total.to(gram.device) + (gram - torch.eye(len(gram), device=gram.device)).norm()
    return total


def _untyped(value: Any) -> Any:
    """For the parts of the library without types."""
    return value
