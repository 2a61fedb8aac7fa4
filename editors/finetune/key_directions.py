"""Input directions that separate the keys of target rows from the keys of preserved rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import assumed

RIDGE = assumed(
    0.05,
    "ridge when target keys are projected off the preserved keys, in units of their mean square",
    "larger lets a key keep more of what it shares with preserved keys; no comparison is known",
)


@dataclass(frozen=True)
class ModuleKeys:
    """Inputs of one module, recorded before training."""

    target: Tensor  # (m, d_in) at the tokens where the target is learned
    preserved: Tensor  # (p, d_in) at all other tokens
    output_rms: float  # root mean square of the module's output at the target tokens


def key_directions(keys: ModuleKeys, rank: int, ridge: float = RIDGE) -> Tensor:
    """At most `rank` directions (n, d_in) that respond to the target keys and hardly to the preserved ones.

    Each target key is projected off the span of the preserved keys (with a ridge) and scaled so that its
    dot product with itself is 1. This is ROME's right-hand side (Meng et al. 2022, eq. 2) with the
    preserved keys in place of the second moment. With more target keys than `rank`, their first right
    singular vectors are used, scaled so that the mean key gives 1 on the first.
    """
    target, preserved = keys.target.double().cpu(), keys.preserved.double().cpu()
    gram = preserved @ preserved.t()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    projected = target - torch.linalg.solve(gram, preserved @ target.t()).t() @ preserved
    response = (projected * target).sum(1, keepdim=True)  # positive: with a ridge the projection contracts
    directions: Tensor = projected / response.clamp(min=1e-9)
    if len(directions) <= rank:
        return directions.float()
    _, s, vt = torch.linalg.svd(directions, full_matrices=False)
    top: Tensor = vt[:rank] * (s[:rank, None] / s[0])
    mean = float(vt[0] @ target.mean(0))
    return (top / mean if abs(mean) > 1e-9 else top).float()
