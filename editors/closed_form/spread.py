"""Spread target values over several layers, for each fact on its own (MEMIT, sec. 4.3 and algorithm 1).

MEMIT updates its layers from the lowest up, and after each it reads the keys and the remaining residual again. Here
each layer's share is added at the fact's own token instead of through the matrix of the whole batch. So a fact's keys
and residuals do not depend on the other facts, and the batch can be solved again without any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.closed_form.keys import read_keys
from editors.closed_form.values import TargetValues
from editors.model.activations import record, replace
from editors.model.lm import LM

CHUNK = 32  # edits whose keys are read together
Rows = Sequence[Sequence[int]]  # token ids


@dataclass(frozen=True)
class Share:
    """The part of n facts that one layer writes."""

    keys: Tensor  # (rows, d_in) float32, `counts[i]` consecutive ones per fact, one per context
    residuals: Tensor  # (n, d_out) float32


def spread(
    lm: LM,
    layers: Sequence[int],
    rows: Sequence[Rows],
    values: TargetValues,
    root: bool = False,
    step: Callable[[float], None] = lambda fraction: None,
) -> dict[int, Share]:
    """Keys and residuals of every layer, lowest first; `values` are the target values at the last of them.

    `rows` are each fact's sequences up to the token its key is read at.

    What is left of z - h at the last layer is divided by the number of layers left, or with `root`
    by its square root (PMET, eq. 13).
    """
    if len(layers) == 1:
        every = [row for mine in rows for row in mine]
        return {layers[0]: Share(read_keys(lm, layers, every)[layers[0]], values.deltas)}
    parts: list[dict[int, Share]] = []
    for at in range(0, len(rows), CHUNK):
        walk = _Walk(lm, layers, rows[at : at + CHUNK])
        deltas = values.deltas[at : at + CHUNK].to(lm.device)
        shares: dict[int, Share] = {}
        for i, layer in enumerate(layers):
            step((at + CHUNK * i / len(layers)) / max(len(rows), at + CHUNK))
            left = len(layers) - i
            shares[layer] = walk.share(layer, deltas, left**0.5 if root else left)
        parts.append(shares)
    return {
        layer: Share(
            torch.cat([p[layer].keys for p in parts]), torch.cat([p[layer].residuals for p in parts])
        )
        for layer in layers
    }


class _Walk:
    """Rows of some edits up to the subject's last token, run with the shares of the layers done so far."""

    def __init__(self, lm: LM, layers: Sequence[int], rows: Sequence[Rows]) -> None:
        self.lm, self.last = lm, lm.layers[layers[-1]]
        self.owner = torch.tensor([i for i, mine in enumerate(rows) for _ in mine], device=lm.device)
        self.ids, self.mask = lm.pad([row for mine in rows for row in mine], left=True)
        self.inside: dict[
            nn.Module, Tensor
        ] = {}  # MLP output projection -> (rows, d_out) added to its output
        self.before: Tensor | None = None  # (n, d_model) the last layer's state with nothing added

    @torch.no_grad()
    def share(self, layer: int, deltas: Tensor, divisor: float) -> Share:
        """Keys at `layer`, and its part of what remains of `deltas` (n, d_model) at the last layer."""
        out = self.lm.module(self.lm.mlp_out(layer))
        keys, state = self._run(out)
        self.before = state if self.before is None else self.before
        residual = (self.before + deltas - state) / divisor
        self.inside[out] = residual[self.owner]
        return Share(keys.float().cpu(), residual.float().cpu())

    def _run(self, out: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys (rows, d_in) of one projection, and the last layer's state (n, d_model) averaged over contexts."""
        n = len(self.ids)
        with (
            replace({module: self._adding(value) for module, value in self.inside.items()}),
            record({"key": out}, inputs=True) as key,
            record({"state": self.last}, stop=True) as state,
        ):
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            self.lm.base_model(
                input_ids=self.ids, attention_mask=self.mask, position_ids=positions, use_cache=False
            )
        keys = key["key"].reshape(n, self.ids.shape[1], -1)[:, -1]
        states = state["state"].reshape(n, self.ids.shape[1], -1)[:, -1].to(self.owner.device).float()
        total = torch.zeros(int(self.owner.max()) + 1, states.shape[1], device=states.device)
        counts = torch.bincount(self.owner)[:, None]
        return keys, total.index_add(0, self.owner, states) / counts

    def _adding(self, value: Tensor) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            shaped = output.reshape(len(self.ids), self.ids.shape[1], -1).clone()
            shaped[:, -1] += value.to(output)
            return shaped.reshape(output.shape)

        return add
