"""Neurons of an MLP that an edit takes over: which ones, and what their weights become.

Two neurons make a ramp. With a detector z of an MLP's input, the first is active from z = LOW on, the second from
HIGH on, and their difference rises from 0 to 1 between the two. What is added to the residual stream is as large for
every wording that the detector recognises, and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editors.closed_form.detectors import MARGIN
from editors.constants import assumed, limit
from editors.errors import EditError
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch

HIGH = MARGIN
NEURONS = "neurons"  # in `Patch.info`
SHARPNESS = assumed(
    4.0,
    "slope of a neuron's input per unit of its detector",
    "a gate of SiLU or GELU is then within .07 of zero where a detector says -1; no comparison is known",
)
MOST_TAKEN = limit(
    0.25,
    "share of a layer's neurons that edits may take over; then a call is refused, with what to do",
    "each had a small part in what the model says",
)
ACTIVATIONS = ("silu", "swish", "gelu", "relu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu")
"""Activation functions that are nearly linear above zero and nearly zero below it; two of them make a ramp."""


@dataclass(frozen=True)
class Neuron:
    """The changes of one neuron's weights."""

    index: int
    gate: Tensor  # (d_model,) of what it reads
    up: Tensor | None  # (d_model,) of what multiplies the gate, where there is one
    down: Tensor  # (d_model,) of what it writes


def why_no_ramp(lm: LM, layer: int) -> str | None:
    """None, or why two neurons of this layer's MLP do not make a ramp."""
    if lm.mlp_out(layer) in lm.experts or not lm.mlp_in(layer):
        return f"layer {layer} of this {lm.arch.family} model has experts instead of one MLP"
    config = lm.model.config.get_text_config()
    named = (
        getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function")
    )
    activation = next((name for name in named if isinstance(name, str)), "silu")
    if activation not in ACTIVATIONS:
        return f"the activation of this {lm.arch.family} model's MLPs is {activation}, of which no ramp can be made"
    return None


class MLPNeurons:
    """The neurons of one layer's MLP as they are now."""

    def __init__(self, lm: LM, layer: int) -> None:
        inputs = lm.mlp_in(layer)
        self.gate, self.up, self.down = inputs[0], inputs[-1], lm.mlp_out(layer)
        self.size = lm.shape(self.down)[1]
        rows = lm.shape(self.gate)[0]
        self.gated = len(inputs) > 1 or rows == 2 * self.size
        self.fused = self.gated and self.gate == self.up
        self._offset = self.size if self.fused else 0
        self._read = lm.weight(self.gate).float().cpu()
        self._multiplied = lm.weight(self.up).float().cpu() if self.gated else None
        self._written = lm.weight(self.down).float().cpu()
        self._bias = _bias_of(lm, self.gate, rows)
        self._up_bias = _bias_of(lm, self.up, self._offset + self.size) if self.gated else None

    def least_used(self, activity: Tensor, taken: Collection[int]) -> list[int]:
        """Indices of the neurons that write least on ordinary text, the least first, without those `taken`.

        `activity` (d_ff,) is the root mean square of each one's activation there. There are so many as may be taken.
        """
        usage = activity * self._written.norm(dim=0)
        room = max(2, int(MOST_TAKEN * self.size)) - len(taken)
        return [i for i in usage.argsort().tolist() if i not in taken][: max(0, room)]

    def ramp(
        self, indices: Sequence[int], detector: Tensor, one: Tensor, low: float
    ) -> tuple[list[Neuron], Tensor]:
        """Two neurons that read a detector (d_model,), and x (d_ff,), whose product with the activations is the ramp.

        `one` (d_model,) is nearly 1 at every input. What the neurons wrote before is taken away.
        """
        found, x = [], torch.zeros(self.size)
        for index, start, sign in zip(indices, (low, HIGH), (1.0, -1.0), strict=True):
            row = SHARPNESS * (detector - start * one) - self._bias[index] * one
            up = None
            if self._multiplied is not None:
                assert self._up_bias is not None
                wanted = (1 - self._up_bias[self._offset + index]) * one
                up = wanted - self._multiplied[self._offset + index]
            found.append(Neuron(index, row - self._read[index], up, -self._written[:, index]))
            x[index] = sign / (SHARPNESS * (HIGH - low))
        return found, x

    def deltas(self, neurons: Sequence[Neuron]) -> dict[str, LowRank]:
        """The changes as low-rank ones; each neuron has as many columns in all of them: 2 where gate and up are one."""
        n, width = len(neurons), 2 if self.fused else 1
        at = [neuron.index for neuron in neurons]
        reads = [neuron.gate for neuron in neurons]
        ups = [neuron.up for neuron in neurons if neuron.up is not None]
        writes = torch.stack([neuron.down for neuron in neurons], 1)
        down = LowRank(_spread(writes.t(), width).t().contiguous(), _spread(_one_hot(at, self.size), width))
        if self.fused:
            rows = [i for k in at for i in (k, self.size + k)]
            both = [each for pair in zip(reads, ups, strict=True) for each in pair]
            wide = _one_hot(rows, 2 * self.size).t().contiguous()
            return {self.gate: LowRank(wide, torch.stack(both)), self.down: down}
        left = _one_hot(at, self.size).t().contiguous()
        found = {self.gate: LowRank(left, torch.stack(reads)), self.down: down}
        if len(ups) == n:
            found[self.up] = LowRank(left.clone(), torch.stack(ups))
        return found


def writing(neurons: Sequence[Neuron], x: Tensor, value: Tensor) -> list[Neuron]:
    """The neurons of a ramp x (d_ff,) that write the value (d_model,) too."""
    return [replace(neuron, down=neuron.down + x[neuron.index] * value) for neuron in neurons]


def taken_over(patch: Patch) -> dict[str, set[int]]:
    """The neurons that a patch has taken over, by the weight that they read with; empty for most patches.

    `patch.info` says under `neurons` which weights these are, and how many neurons their MLPs have.
    """
    if not isinstance(patch, WeightPatch):
        return {}
    found: dict[str, set[int]] = {}
    for name, size in dict(patch.info.get(NEURONS, {})).items():
        delta = patch.deltas.get(name)
        if isinstance(delta, LowRank):
            found[name] = {i % int(size) for i in delta.left.abs().argmax(0).tolist()}
    return found


def taken_by(patches: Iterable[Patch], gate: str) -> set[int]:
    """The neurons that read with the weight `gate` and that these patches have taken over."""
    return {i for patch in patches for i in taken_over(patch).get(gate, ())}


def refuse_shared_neurons(patches: Iterable[Patch]) -> None:
    """Raise EditError where two patches have taken over the same neuron: together neither of them says its fact."""
    seen: dict[str, set[int]] = {}
    for patch in patches:
        for name, mine in taken_over(patch).items():
            if seen.setdefault(name, set()) & mine:
                raise EditError(
                    f"two of these edits have taken over the same neurons ({name}): one was made while the other was "
                    "reverted, or elsewhere. Revert the one that is active (list_edits names it), or make this edit "
                    "anew with apply_edits, which takes other neurons"
                )
            seen[name] |= mine


def none_left(layer: int) -> EditError:
    """The error for a layer of which no more neurons may be taken over."""
    return EditError(
        f"edits have taken over {MOST_TAKEN:.0%} of the neurons of layer {layer}; name another params.layer, revert "
        "some of them, or use method memit, which takes none"
    )


def joined_deltas(parts: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """The changes of several facts, their columns one after another."""
    return {
        name: LowRank(torch.cat([p[name].left for p in parts], 1), torch.cat([p[name].right for p in parts]))
        for name in parts[0]
    }


def _bias_of(lm: LM, parameter: str, size: int) -> Tensor:
    bias = getattr(lm.module(parameter), "bias", None)
    return torch.zeros(size) if bias is None else bias.detach().float().cpu()


def _one_hot(indices: Sequence[int], size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(list(indices)), size).float()


def _spread(rows: Tensor, width: int) -> Tensor:
    """Each row followed by width - 1 rows of zeros."""
    if width == 1:
        return rows.contiguous()
    found = torch.zeros(len(rows) * width, rows.shape[1])
    found[::width] = rows
    return found
