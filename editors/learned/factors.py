"""The gradient of a weight as rank-one factors, one per token, and low-rank changes applied per row.

For y_t = W u_t the gradient of a loss is dL/dW = sum_t delta_t u_t^T with delta_t = dL/dy_t
(MEND, sec. 3.1). Neither that sum nor a changed weight is ever made: inputs and output gradients
are caught by hooks, and a change U~, D~ adds (x U~^T) D~ to a layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.learned.batches import Batch
from editors.model.activations import hooked
from editors.model.lm import LM


@dataclass(frozen=True)
class Factors:
    """Of one weight and n edits, padded with zeros to the longest: dL/dW_i = sum_t deltas[i,t] inputs[i,t]^T."""

    inputs: Tensor  # (n, t, d_in) u
    deltas: Tensor  # (n, t, d_out) delta


def gradient_factors(lm: LM, parameters: Sequence[str], batch: Batch) -> tuple[dict[str, Factors], Tensor]:
    """The factors of each weight for every row's own loss (mean over its answer tokens), and the losses.

    Rows do not mix, so the gradient of the sum of losses is each row's own.
    """
    inputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            leaves[name] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[name]

        return hook

    handles = [lm.module(name).register_forward_hook(hook_for(name)) for name in parameters]
    with torch.enable_grad(), hooked(handles):
        losses = batch.loss(batch.logits())
        grads = torch.autograd.grad(losses.sum(), [leaves[name] for name in parameters])
    found = {}
    for name, grad in zip(parameters, grads, strict=True):
        shape = (batch.rows, -1)
        u = inputs[name].reshape(*shape, inputs[name].shape[-1]).float()
        d = grad.reshape(*shape, grad.shape[-1]).float()
        inside = d.abs().amax(-1, keepdim=True) > 0  # padding has no gradient
        found[name] = Factors(u * inside, d)
    return found, losses.detach()


@contextmanager
def changed(lm: LM, changes: Mapping[str, Factors], rows_per_edit: int) -> Iterator[None]:
    """Run with W + sum_t deltas[i,t] inputs[i,t]^T for the rows of edit i; nothing stays.

    The batch has `rows_per_edit` consecutive rows for each edit.
    """

    def hook_for(change: Factors) -> Any:
        n = change.inputs.shape[0]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].reshape(n, -1, args[0].shape[-1]).float()  # (n, rows of the edit x length, d_in)
            added = x @ change.inputs.transpose(1, 2) @ change.deltas
            return output.add(added.reshape(output.shape).to(output.dtype))

        return hook

    handles = [lm.module(name).register_forward_hook(hook_for(c)) for name, c in changes.items()]
    with hooked(handles):
        yield
