"""Gradients of weights as rank-one factors, one per token, and low-rank changes that differ from row to row.

For y_t = W u_t the gradient of a loss is dL/dW = sum_t delta_t u_t^T with delta_t = dL/dy_t
(MEND, sec. 3.1). Neither this sum nor a changed weight is computed. Hooks record inputs and output gradients, and a
change with the factors U and D adds (x U^T) D to a layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.learned.batches import TokenBatch
from editors.model.activations import hooked
from editors.model.lm import LM


@dataclass(frozen=True)
class Factors:
    """Factors of one weight's gradient for n edits: dL/dW_i = sum_t deltas[i,t] inputs[i,t]^T.

    Edits with fewer tokens are padded with zeros.
    """

    inputs: Tensor  # (n, t, d_in) u
    deltas: Tensor  # (n, t, d_out) delta


def lowest_layer(lm: LM, names: Sequence[str]) -> int | None:
    """The lowest layer with one of these weights; None where none has, or where an encoder's are edited too."""
    if lm.arch.encoder_layers is not None:
        return None
    return min((i for i in range(lm.n_layers) if lm.mlp_out(i) in names), default=None)


def gradient_factors(
    lm: LM, parameters: Sequence[str], batch: TokenBatch
) -> tuple[dict[str, Factors], Tensor]:
    """The gradient factors of each weight for each row's own loss, and the losses (rows,).

    A row's loss is the mean over its answer tokens. Rows do not interact, so one backward pass of the summed losses
    gives the gradient of every row.
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
    factors = {}
    for name, grad in zip(parameters, grads, strict=True):
        shape = (batch.rows, -1)
        u = inputs[name].reshape(*shape, inputs[name].shape[-1]).to(lm.device).float()
        d = grad.reshape(*shape, grad.shape[-1]).to(lm.device).float()
        inside = d.abs().amax(-1, keepdim=True) > 0  # padding has no gradient
        factors[name] = Factors(u * inside, d)
    return factors, losses.detach()


@contextmanager
def changed(lm: LM, changes: Mapping[str, Factors], rows_per_edit: int) -> Iterator[None]:
    """Run the model with W + sum_t deltas[i,t] inputs[i,t]^T in the rows of edit i. The weights do not change.

    Args:
        rows_per_edit: number of consecutive rows of the batch that belong to one edit.
    """

    def hook_for(name: str, change: Factors) -> Any:
        n, device = change.inputs.shape[0], lm.place(name)
        keys, values = change.inputs.to(device).transpose(1, 2), change.deltas.to(device)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].reshape(n, -1, args[0].shape[-1]).float()  # (n, rows of the edit x length, d_in)
            added = x @ keys @ values
            return output.add(added.reshape(output.shape).to(output.dtype))

        return hook

    handles = [lm.module(name).register_forward_hook(hook_for(name, c)) for name, c in changes.items()]
    with hooked(handles):
        yield
