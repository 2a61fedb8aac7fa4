"""Adapters that cannot be written as a change of a weight of their own. They act through hooks while attached.

These are DoRA, IA3, and changes of one of two modules that share a weight, such as a head tied to the embeddings: a
change of the weight would change both.
"""

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


@dataclass(frozen=True)
class Ia3Output:
    """y = l * (W x + b): one learned factor per output, as IA3 has them in attention."""

    scales: Tensor  # (d_out,), l

    def hook(self, dtype: torch.dtype, device: torch.device) -> Hook:
        parts = Parts(self.scales.to(device), dtype=dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            return with_first(output, out * parts.like(out)[0])

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"scales": self.scales}


@dataclass(frozen=True)
class Lora:
    """y = W x + B A x + c beside a linear module, whose weight stays as it is."""

    left: Tensor  # (d_out, r), B times the scaling
    right: Tensor  # (r, d_in), A
    bias: Tensor | None = None  # (d_out,), c

    def hook(self, dtype: torch.dtype, device: torch.device) -> Hook:
        bias = None if self.bias is None else self.bias.to(device)
        parts = Parts(self.left.to(device), self.right.to(device), bias, dtype=dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            left, right, bias = parts.like(args[0])
            change = args[0] @ right.t() @ left.t()
            return with_first(output, out + (change if bias is None else change + bias).to(out.dtype))

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right} | ({} if self.bias is None else {"bias": self.bias})


@dataclass(frozen=True)
class EmbeddingLora:
    """The row of each token plus a low-rank change, beside an embedding whose weight stays as it is."""

    rows: Tensor  # (vocabulary, r), A transposed
    right: Tensor  # (r, d_model), B transposed, times the scaling

    def hook(self, dtype: torch.dtype, device: torch.device) -> Hook:
        parts = Parts(self.rows.to(device), self.right.to(device), dtype=dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            rows, right = parts.like(out)
            return with_first(output, out + _embed_scale(module, out) * (rows[args[0]] @ right))

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "right": self.right}


@dataclass(frozen=True)
class WholeWeight:
    """A module computes with another weight of its own (PEFT's modules_to_save)."""

    whole: Tensor  # (d_out, d_in), or (vocabulary, d_model) of an embedding

    def hook(self, dtype: torch.dtype, device: torch.device) -> Hook:
        parts = Parts(self.whole.to(device), dtype=dtype)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            if isinstance(module, nn.Embedding):
                [weight] = parts.like(out)
                return with_first(output, weight[args[0]] * _embed_scale(module, out))
            [weight] = parts.like(args[0])
            bias: Any = module.bias
            return with_first(output, nn.functional.linear(args[0], weight, bias).to(out.dtype))

        return hook

    def parts(self) -> dict[str, Tensor]:
        return {"whole": self.whole}


def _embed_scale(module: nn.Module, like: Tensor) -> Tensor | float:
    """The factor by which some families (Gemma 3) multiply their embeddings."""
    scale: Any = getattr(module, "embed_scale", 1.0)
    return scale.to(like.dtype) if isinstance(scale, Tensor) else float(scale)


Piece = Dora | Ia3 | Ia3Output | Lora | EmbeddingLora | WholeWeight
_KINDS: dict[frozenset[str], type[Any]] = {
    frozenset({"factors"}): Ia3,
    frozenset({"scales"}): Ia3Output,
    frozenset({"left", "right", "magnitude"}): Dora,
    frozenset({"left", "right"}): Lora,
    frozenset({"left", "right", "bias"}): Lora,
    frozenset({"rows", "right"}): EmbeddingLora,
    frozenset({"whole"}): WholeWeight,
}


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
            kind = _KINDS.get(frozenset(parts))
            if kind is None:
                raise EditError(f"the adapter of {name} has the parts {sorted(parts)}")
            rows[row][name] = kind(**parts)
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
    shape, place = lm.shape(name), lm.place(name)
    dtype = lm.dtype if name in lm.quantised else lm.weight(name).dtype
    if isinstance(piece, Ia3):
        if piece.factors.shape != (shape[1],):
            raise EditError(f"the adapter of {name} has {tuple(piece.factors.shape)} factors, not {shape[1]}")
        return [module.register_forward_pre_hook(piece.pre_hook(dtype, place))]
    if not isinstance(piece, Dora):
        if _shape(piece, module, shape) != shape:
            raise EditError(f"the adapter of {name} does not have the weight's shape {shape}")
        return [module.register_forward_hook(piece.hook(dtype, place))]
    if (piece.left.shape[0], piece.right.shape[1]) != shape:
        raise EditError(f"the adapter of {name} does not have the weight's shape {shape}")
    return [module.register_forward_hook(piece.hook(lm.weight(name), module.bias))]


def _shape(
    piece: Ia3Output | Lora | EmbeddingLora | WholeWeight, module: Any, shape: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of the weight that a piece fits. Raises EditError for another kind of module."""
    if isinstance(piece, EmbeddingLora) and not isinstance(module, nn.Embedding):
        raise EditError(f"an adapter of embeddings does not fit a {type(module).__name__}")
    if isinstance(piece, WholeWeight):
        return tuple(piece.whole.shape)
    if isinstance(piece, EmbeddingLora):
        return piece.rows.shape[0], piece.right.shape[1]
    if isinstance(piece, Lora):
        return piece.left.shape[0], piece.right.shape[1]
    return piece.scales.shape[0], shape[1]


def patch_rows(patch: Patch, rows: Sequence[int]) -> AdapterPatch:
    """`subset` for adapters."""
    assert isinstance(patch, AdapterPatch)
    return patch.rows(rows)
