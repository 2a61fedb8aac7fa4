"""Second moments C = E[k k^T] of the keys: many layers in one pass, and how well a moment can be inverted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from editors.constants import assumed
from editors.metric import CPU, has_room, placed
from editors.model.activations import record
from editors.model.lm import LM
from editors.moments.texts import Progress, facts_text, sample_text

FACTS = assumed(
    2 / 3,
    "share of those tokens that comes from the shipped facts, if there are enough",
    "sampling the rest from the model takes longer",
)


@dataclass(frozen=True)
class Moment:
    """Second moment of one layer's keys."""

    layer: int
    matrix: Tensor  # (d_in, d_in) float32; of experts (E, d_inner, d_inner), one block each
    tokens: int
    sample: str  # "self" or the corpus' digest


@torch.no_grad()
def compute_moments(
    lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]], sample: str, progress: Progress
) -> dict[int, Moment]:
    """Second moments of the MLP output projections' inputs, all `layers` in one pass over `rows`.

    The first position of each sequence is left out: it is an attention sink whose key dwarfs all others.
    They are summed where the model is, or on the CPU when there is no room for them there.
    """
    modules = {i: lm.module(lm.mlp_out(i)) for i in layers}
    total: dict[int, Tensor] = {}
    count = 0
    for at in range(0, len(rows), 16):
        progress(at / len(rows), "second moments")
        batch = rows[at : at + 16]
        ids, mask = lm.pad(batch)
        inside = mask.clone()
        inside[:, 0] = 0
        with record(modules, inputs=True, stop=True) as seen:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for i, keys in seen.items():
            k = keys.reshape(*ids.shape, -1)[inside.bool().to(keys.device)].float()
            blocks = experts_of(lm, lm.mlp_out(i))
            width = k.shape[1] // blocks
            if i not in total:
                home = k.device if has_room(k.device, 3 * 4 * blocks * width**2) else CPU
                total[i] = torch.zeros(blocks, width, width, device=home)
            k = k.to(total[i].device).reshape(len(k), blocks, width)
            for block in range(blocks):
                total[i][block].addmm_(k[:, block].t(), k[:, block])
        count += int(inside.sum())
    return {i: Moment(i, (_whole(total[i]) / count).cpu(), count, sample) for i in layers}


def _whole(blocks: Tensor) -> Tensor:
    return blocks[0] if len(blocks) == 1 else blocks


def experts_of(lm: LM, parameter: str) -> int:
    """How many experts stand side by side in a weight; 1 for a plain one."""
    return lm.experts[parameter].count if parameter in lm.experts else 1


def tokens_per_key(lm: LM, parameter: str) -> int:
    """How many tokens give each expert as many keys as one of its keys has inputs; d_in for a plain weight."""
    d_in = lm.shape(parameter)[1]
    if parameter not in lm.experts:
        return d_in
    return d_in // max(1, int(lm.model.config.get_text_config().num_experts_per_tok))


def own_moments(
    lm: LM,
    layers: Sequence[int],
    tokens: int,
    progress: Progress,
    sample: Callable[[LM, int, Progress], list[list[int]]] = sample_text,
) -> dict[int, Moment]:
    """The mean of two second moments that need no corpus: of the shipped facts, and of text sampled from the model.

    `tokens` in all, of which the facts are FACTS at most. `sample` gives the sampled text.
    """
    known = facts_text(lm, int(FACTS * tokens))
    spoken = sample(lm, tokens - sum(map(len, known)), lambda f, m: progress(0.5 * f, m))
    parts = [
        compute_moments(lm, layers, rows, "self", partial(_part, progress, start))
        for rows, start in ((known, 0.5), (spoken, 0.75))
        if rows
    ]
    return {i: _mean([part[i] for part in parts]) for i in layers}


def _part(progress: Progress, start: float, fraction: float, message: str) -> None:
    progress(start + 0.25 * fraction, message)


def _mean(parts: Sequence[Moment]) -> Moment:
    matrix = torch.stack([p.matrix for p in parts]).mean(0)
    return replace(parts[0], matrix=matrix, tokens=sum(p.tokens for p in parts))


@dataclass(frozen=True)
class Conditioning:
    """How well a second moment is conditioned, before and after the ridge."""

    condition: float  # largest over smallest eigenvalue; inf when there are fewer tokens than inputs
    regularised: float  # the same with the ridge added
    effective_rank: float  # (sum of eigenvalues)^2 / sum of squares
    tokens_per_input: float  # below 1 the moment is singular; 2 and more are enough


def condition_of(moment: Moment, ridge: float, device: torch.device = CPU) -> Conditioning:
    """Spectrum of a second moment, found on `device`; `ridge` as the methods add it, in units of the mean diagonal."""
    matrix = placed(moment.matrix, device, 8)
    values = torch.linalg.eigvalsh(matrix.double()).clamp(min=0).cpu().flatten().sort().values
    top, floor = float(values[-1]), float(values[0])
    added = ridge * float(moment.matrix.diagonal(dim1=-2, dim2=-1).mean())
    return Conditioning(
        condition=top / floor if floor > 1e-12 * top else float("inf"),
        regularised=(top + added) / (floor + added),
        effective_rank=float(values.sum() ** 2 / values.square().sum()),
        tokens_per_input=moment.tokens / len(values),
    )
