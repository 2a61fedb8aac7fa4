"""Where a low-rank change starts: input directions that tell the keys of an edit from the keys to be preserved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import TWO_MODELS, assumed, published, tuned

RIDGE = assumed(
    0.05,
    "ridge when the keys of an edit are projected off other keys, in units of these keys' mean square",
    "keeps the solve stable with few keys; larger lets a key keep more of what it shares with the others",
)
RANK = assumed(4, "rank of the change that one edit trains in a weight, by lora or when a memory is taught")
RATE = tuned(
    5e-3,
    "Adam's step size of the left factor (lora_B) of such a change",
    models=TWO_MODELS,
    command="python -m benchmarks.constants editors.finetune.lora.LoraParams.lr --values 0.002 0.012 -n 4 "
    "--method lora",
    figure="makes no difference to any rate between 0.002 and 0.012, for the stride is held: reworded / chat / "
    "neighbours / the subject's other facts .67 / 1.0 / .65 / .59 and .58 / .50 / .10 / .21; perplexity, first model: "
    "0.005 x1.201, 0.002 x1.197, 0.012 x1.260; second: x1.266, x1.264, x1.263",
)
RIGHT_FACTOR = published(
    1 / 16,
    "step size of its right factor (lora_A), in units of RATE",
    "LoRA+; Hayou et al. 2024, arXiv 2402.12354",
)
STRIDE = assumed(
    0.3, "how far the first step of such a change moves a module's output, in units of the output's size"
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
