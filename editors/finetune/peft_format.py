"""Weight patches as a standard PEFT LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editors.errors import Unsupported
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM

PREFIX = "base_model.model."  # PEFT's wrapper around the model
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its configuration, its tensors as PEFT names them, and the error of its compression."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    deltas: dict[str, LowRank]  # by parameter: the change that loading it adds
    errors: dict[str, float]  # by parameter: relative error (Frobenius) of recompression, 0 where exact

    @property
    def ranks(self) -> dict[str, int]:
        return {name: d.left.shape[1] for name, d in self.deltas.items()}


def as_adapter(
    lm: LM, deltas: Mapping[str, Sequence[Delta]], base: str, max_rank: int | None = None
) -> Adapter:
    """The sum of the deltas of each parameter as one LoRA adapter: lora_B @ lora_A = sum, with scaling 1.

    Each module has its own rank (PEFT's rank_pattern). Alpha equals the rank everywhere, so that programs
    that ignore patterns also scale by 1. Ranks above `max_rank` are cut by SVD. Raises Unsupported for
    weights that LoRA cannot change.
    """
    factors: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, parts in sorted(deltas.items()):
        _refuse_other_modules(lm, name)
        exact = joined(parts)
        factors[name], errors[name] = exact, 0.0
        if max_rank is not None and exact.left.shape[1] > max_rank:
            factors[name], errors[name] = recompressed(exact, max_rank)
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        module = name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = factor.right.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = factor.left.contiguous()
    return Adapter(_config(lm, factors, base), tensors, factors, errors)


def _refuse_other_modules(lm: LM, name: str) -> None:
    module = lm.module(name)
    if name in lm.experts:
        raise Unsupported(
            f"{name} are the experts of a layer, which a LoRA adapter cannot change; export as merged, or as patches"
        )
    fits = name in lm.quantised or type(module) in (nn.Linear, Conv1D)
    if not name.endswith(".weight") or not fits:
        raise Unsupported(
            f"{name} belongs to a {type(module).__name__}, which a LoRA adapter cannot change; export as merged"
        )


def joined(deltas: Sequence[Delta]) -> LowRank:
    """Exact factors of the sum: concatenated factors, or the dense sum and the identity if that is smaller."""
    shape = shape_of(deltas[0])
    ranks = [d.left.shape[1] if isinstance(d, LowRank) else min(shape) for d in deltas]
    if sum(ranks) < min(shape) and all(isinstance(d, LowRank) for d in deltas):
        lefts = [d.left for d in deltas if isinstance(d, LowRank)]
        rights = [d.right for d in deltas if isinstance(d, LowRank)]
        return LowRank(torch.cat(lefts, 1), torch.cat(rights, 0))
    total = torch.zeros(shape)
    for delta in deltas:
        delta.add_to(total)
    if shape[0] <= shape[1]:
        return LowRank(torch.eye(shape[0]), total)
    return LowRank(total, torch.eye(shape[1]))


def shape_of(delta: Delta) -> tuple[int, ...]:
    """(d_out, d_in); (d,) of a bias or a norm."""
    if isinstance(delta, LowRank):
        return delta.left.shape[0], delta.right.shape[1]
    return tuple(delta.delta.shape)


def recompressed(factor: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best approximation of at most this rank, and its relative error in the Frobenius norm.

    The singular values come from the small core of two QR decompositions, in float64.
    """
    q_left, r_left = torch.linalg.qr(factor.left.double())  # (d_out, k), (k, r)
    q_right, r_right = torch.linalg.qr(factor.right.double().t())  # (d_in, k), (k, r)
    u, s, vt = torch.linalg.svd(r_left @ r_right.t())
    rank = min(rank, s.numel())
    root = s[:rank].sqrt()
    left = (q_left @ u[:, :rank]) * root
    right = root[:, None] * (vt[:rank] @ q_right.t())
    total = float(s.square().sum())
    error = float((s[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return LowRank(left.float().contiguous(), right.float().contiguous()), error


def _config(lm: LM, factors: Mapping[str, LowRank], base: str) -> dict[str, Any]:
    """adapter_config.json as PEFT itself writes it."""
    from peft import LoraConfig

    ranks = {name.removesuffix(".weight"): f.left.shape[1] for name, f in factors.items()}
    max_rank = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != max_rank}
    config: Any = LoraConfig(
        base_model_name_or_path=base,
        task_type=lm.arch.peft_task,
        inference_mode=True,
        r=max_rank,
        lora_alpha=max_rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(lm.is_transposed(name) for name in factors),
    )
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return {k: getattr(v, "value", v) for k, v in values.items()}
