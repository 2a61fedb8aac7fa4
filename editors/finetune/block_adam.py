"""Adam with one second moment for a whole weight (Adam-mini; Zhang et al., arXiv 2406.16793)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editors.constants import published

BETAS = published((0.9, 0.999), "decay rates of Adam's two moments", "Kingma & Ba 2015, arXiv 1412.6980")
EPSILON = 1e-12  # keeps a gradient of zero from being divided by zero


class BlockAdam(torch.optim.Optimizer):
    """Adam-mini with one block for each weight.

    Every step is a scaled sum of past gradients, so the total change stays in the gradients' span: it has
    low rank and lies along the inputs trained on. Adam scales each entry separately and would spread the
    change over all inputs.
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, betas: tuple[float, float] = BETAS) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each weight along its mean gradient, divided by the root mean square of its gradients."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(count=0, mean=torch.zeros_like(weight), square=0.0)
                state["count"] += 1
                state["mean"].lerp_(weight.grad, 1 - beta1)
                state["square"] += (1 - beta2) * (float(weight.grad.square().mean()) - state["square"])
                square = state["square"] / (1 - beta2 ** state["count"])
                scale = 1 / (1 - beta1 ** state["count"]) / (square**0.5 + EPSILON)
                weight.sub_(state["mean"], alpha=group["lr"] * scale)
