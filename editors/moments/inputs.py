"""What an MLP reads on ordinary text: a sample of its inputs, and how much each of its neurons is used there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import limit
from editors.model.activations import record
from editors.model.lm import LM
from editors.moments.texts import Progress

TOKENS = limit(
    8192, "tokens of ordinary text at which the inputs of an MLP are kept", "memory and time, once per model"
)
TOGETHER = 16  # rows read together


@dataclass(frozen=True)
class OrdinaryInputs:
    """The inputs of one layer's MLP at tokens of ordinary text, and its neurons there."""

    layer: int
    inputs: Tensor  # (tokens, d_model) float32: what the first projections read, after the norm before them
    activity: Tensor  # (d_ff,) float32: root mean square of each neuron's activation


@torch.no_grad()
def read_inputs(
    lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]], progress: Progress
) -> dict[int, OrdinaryInputs]:
    """By layer, at every token of `rows`. The layers must have an MLP with projections of its own, no experts."""
    read = {i: lm.module(lm.mlp_in(i)[0]) for i in layers}
    written = {i: lm.module(lm.mlp_out(i)) for i in layers}
    inputs: dict[int, list[Tensor]] = {i: [] for i in layers}
    squares: dict[int, Tensor] = {i: torch.zeros(lm.shape(lm.mlp_out(i))[1]) for i in layers}
    for at in range(0, len(rows), TOGETHER):
        progress(at / len(rows), "inputs of the MLP on ordinary text")
        ids, mask = lm.pad(rows[at : at + TOGETHER])
        with record(read, inputs=True) as before, record(written, inputs=True, stop=True) as after:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for i in layers:
            states, hidden = (seen[i].reshape(*ids.shape, -1)[mask.bool()] for seen in (before, after))
            inputs[i].append(states.float().cpu())
            squares[i] += hidden.float().square().sum(0).cpu()
    return {
        i: OrdinaryInputs(i, torch.cat(inputs[i]), (squares[i] / sum(map(len, inputs[i]))).sqrt())
        for i in layers
    }
