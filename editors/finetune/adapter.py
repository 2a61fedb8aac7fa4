"""Adapters that cannot be written as a weight delta (DoRA and IA3). They act through hooks while attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from editors.errors import EditError
from editors.model.activations import first, with_first
from editors.model.lm import LM
from editors.patch import Detach, LivePatch, Patch, with_training_of

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class Parts:
    """Tensors of a hook in the model's precision, and in that of a search which runs layers in a lower one."""

    def __init__(self, *tensors: Tensor | None, dtype: torch.dtype) -> None:
        self._own = [None if t is None else t.to(dtype) for t in tensors]
        self._by_dtype: dict[torch.dtype, list[Any]] = {dtype: self._own}

    def like(self, activations: Tensor) -> list[Any]:
        """The tensors in the precision of these activations."""
        dtype = activations.dtype
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = [None if t is None else t.to(dtype) for t in self._own]
        return self._by_dtype[dtype]


@dataclass(frozen=True)
class Dora:
    """W' = m (W + B A) / ||W + B A||, rows normalised (Liu et al., ICML 2024, arXiv 2402.09353)."""

    left: Tensor  # (d_out, r), B times the scaling
    right: Tensor  # (r, d_in), A
    magnitude: Tensor  # (d_out,), m

    def hook(self, weight: Tensor, bias: Tensor | None) -> Hook:
        """A forward hook for the module with `weight` (d_out, d_in), whose norm is computed once, here."""
        left, right = (t.to(weight.device, torch.float32) for t in (self.left, self.right))
        norm = torch.addmm(weight.float(), left, right).norm(dim=1)
        parts = Parts(self.magnitude.to(weight.device) / norm, left, right, bias, dtype=weight.dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            scale, left, right, bias = parts.like(out)
            linear = out if bias is None else out - bias  # W x
            changed = scale * (linear + args[0] @ right.t() @ left.t())
            return with_first(output, changed if bias is None else changed + bias)

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "magnitude": self.magnitude}


@dataclass(frozen=True)
class Ia3:
    """y = W (l * x): one learned factor per input (Liu et al., NeurIPS 2022, arXiv 2205.05638)."""

    factors: Tensor  # (d_in,), l

    def pre_hook(self, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        parts = Parts(self.factors.to(device), dtype=dtype)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (args[0] * parts.like(args[0])[0], *args[1:])

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"factors": self.factors}


Piece = Dora | Ia3


@dataclass(frozen=True)
class AdapterPatch(LivePatch):
    """Adapters by row (one edit each) and parameter. Each row acts on top of the earlier ones."""

    kind: ClassVar[str] = "adapter"
    pieces: Sequence[Mapping[str, Piece]]

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for row, pieces in enumerate(self.pieces):
            for name, piece in pieces.items():
                tensors |= {f"{row:05d}:{name}:{part}": t for part, t in piece.parts().items()}
        return tensors

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> AdapterPatch:
        grouped: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, name, part = key.split(":")
            grouped.setdefault((int(number), name), {})[part] = tensor
        rows: list[dict[str, Piece]] = [{} for _ in range(1 + max((r for r, _ in grouped), default=-1))]
        for (row, name), parts in sorted(grouped.items()):
            try:
                rows[row][name] = Ia3(**parts) if "factors" in parts else Dora(**parts)
            except TypeError as error:
                raise EditError(f"the adapter of {name} has the parts {sorted(parts)}") from error
        return cls(rows, extra=extra, info=info)

    def attach(self, lm: LM) -> Detach:
        handles = [
            h for pieces in self.pieces for name, piece in pieces.items() for h in _attach(lm, name, piece)
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def rows(self, rows: Sequence[int]) -> AdapterPatch:
        """The adapters of these rows only."""
        some = AdapterPatch([self.pieces[i] for i in rows], extra=self.extra, info=self.info)
        return with_training_of(some, self, rows)


def _attach(lm: LM, name: str, piece: Piece) -> list[Any]:
    module: Any = lm.module(name)
    weight = lm.weight(name)
    if isinstance(piece, Ia3):
        if piece.factors.shape != (weight.shape[1],):
            raise EditError(
                f"the adapter of {name} has {tuple(piece.factors.shape)} factors, not {weight.shape[1]}"
            )
        return [module.register_forward_pre_hook(piece.pre_hook(weight.dtype, weight.device))]
    if (piece.left.shape[0], piece.right.shape[1]) != tuple(weight.shape):
        raise EditError(f"the adapter of {name} does not have the weight's shape {tuple(weight.shape)}")
    return [module.register_forward_hook(piece.hook(weight, module.bias))]


def patch_rows(patch: Patch, rows: Sequence[int]) -> AdapterPatch:
    """`subset` for adapters."""
    assert isinstance(patch, AdapterPatch)
    return patch.rows(rows)
