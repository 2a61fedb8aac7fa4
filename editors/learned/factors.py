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

from editors.learned.batches import Batch, Pair
from editors.model.activations import hooked, record
from editors.model.lm import LM

RIDGE = 0.05  # of the mean square of the other keys
LEAST = 0.1  # of a key is left at least, or the change would be scaled up without bound


@dataclass(frozen=True)
class Factors:
    """Of one weight and n edits, padded with zeros to the longest: dL/dW_i = sum_t deltas[i,t] inputs[i,t]^T."""

    inputs: Tensor  # (n, t, d_in) u
    deltas: Tensor  # (n, t, d_out) delta


def lowest_layer(lm: LM, names: Sequence[str]) -> int | None:
    """The first decoder layer with one of these weights; None for encoder-decoder models."""
    if lm.is_seq2seq:
        return None
    return min(i for i in range(lm.n_layers) if lm.mlp_out(i) in names)


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
        u = inputs[name].reshape(*shape, inputs[name].shape[-1]).to(lm.device).float()
        d = grad.reshape(*shape, grad.shape[-1]).to(lm.device).float()
        inside = d.abs().amax(-1, keepdim=True) > 0  # padding has no gradient
        found[name] = Factors(u * inside, d)
    return found, losses.detach()


def other_keys(
    lm: LM, parameters: Sequence[str], prompts: Sequence[Sequence[str]], layer: int | None
) -> dict[str, Tensor]:
    """Inputs of each weight at the end of some prompts of each edit: (n, m, d_in), zero where there are fewer."""
    if any(prompts):
        return with_other_keys(lm, parameters, [], prompts, layer)[1]
    return {n: torch.zeros(len(prompts), 1, lm.weight(n).shape[1], device=lm.device) for n in parameters}


@torch.no_grad()
def with_other_keys(
    lm: LM,
    parameters: Sequence[str],
    rows: Sequence[Pair],
    prompts: Sequence[Sequence[str]],
    layer: int | None,
) -> tuple[Batch, dict[str, Tensor]]:
    """The batch of some rows, and `other_keys` read in the same pass.

    An encoder-decoder model can have no rows beside: told more, its decoder would have other tokens.
    """
    texts = list(dict.fromkeys(text for mine in prompts for text in mine))
    flat = [(lm.encode(lm.prompt(text))[0], [0]) for text in texts]
    with record({n: lm.module(n) for n in parameters}, inputs=True) as seen:
        batch = Batch(lm, [*rows, *flat], layer)
        if not seen:  # nothing was to be kept
            batch.states()
    others = torch.arange(len(rows), batch.rows, device=lm.device)
    last = batch.mask.sum(1)[others] - 1
    most = max(1, *map(len, prompts))
    places = [i * most + j for i, mine in enumerate(prompts) for j in range(len(mine))]
    index = {text: j for j, text in enumerate(texts)}
    drawn = [index[text] for mine in prompts for text in mine]
    found = {}
    for name in parameters:
        keys = seen[name].to(lm.device).reshape(batch.rows, -1, seen[name].shape[-1])
        # a decoder that is told nothing yet has one token for each row
        at = last if keys.shape[1] > 1 else torch.zeros_like(last)
        flat_keys = torch.zeros(len(prompts) * most, keys.shape[-1], device=lm.device)
        flat_keys[places] = keys[others, at][drawn].float()
        found[name] = flat_keys.reshape(len(prompts), most, -1)
    return batch.beginning(len(rows)), found


def contrasted(inputs: Tensor, raw: Tensor, keys: Tensor) -> Tensor:
    """Inputs (n, t, d) without what they share with other keys (n, m, d), answering their own token as before.

    x is projected off the span of `keys` (with a ridge), so that the change hardly acts where they come up, and is
    scaled by u.u / u'.u, where u is the `raw` input and u' what the projection leaves of it: ROME's right-hand
    side, with these keys for the second moment.
    """
    gram = keys @ keys.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(keys.shape[1], device=keys.device)
    gram = gram + (RIDGE * diagonal + 1e-6)[:, None, None] * eye

    def off(x: Tensor) -> Tensor:
        weights: Tensor = torch.linalg.solve(gram, keys @ x.transpose(1, 2))
        return x - weights.transpose(1, 2) @ keys

    response = (off(raw) * raw).sum(-1, keepdim=True) / raw.square().sum(-1, keepdim=True).clamp(min=1e-12)
    scaled: Tensor = off(inputs) / response.clamp(min=LEAST)
    return scaled


@contextmanager
def changed(lm: LM, changes: Mapping[str, Factors], rows_per_edit: int) -> Iterator[None]:
    """Run with W + sum_t deltas[i,t] inputs[i,t]^T for the rows of edit i; nothing stays.

    The batch has `rows_per_edit` consecutive rows for each edit.
    """

    def hook_for(name: str, change: Factors) -> Any:
        n, home = change.inputs.shape[0], lm.weight(name).device
        keys, values = change.inputs.to(home).transpose(1, 2), change.deltas.to(home)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].reshape(n, -1, args[0].shape[-1]).float()  # (n, rows of the edit x length, d_in)
            added = x @ keys @ values
            return output.add(added.reshape(output.shape).to(output.dtype))

        return hook

    handles = [lm.module(name).register_forward_hook(hook_for(name, c)) for name, c in changes.items()]
    with hooked(handles):
        yield
