"""What an editor returns: a patch, serialisable to safetensors, that only the host applies.

A patch never holds a reference to a model. `save` and `load` are exact: a loaded patch gives
bit-identical weights or hooks.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from editors.errors import EditError

if TYPE_CHECKING:
    from editors.model.lm import LM

FORMAT = "errata-patch-1"
Detach = Callable[[], None]


@dataclass(frozen=True)
class LowRank:
    """delta = left @ right, in float32."""

    left: Tensor  # (d_out, r)
    right: Tensor  # (r, d_in)

    def add_to(self, weight: Tensor) -> None:
        """Add to `weight` (d_out, d_in, float32) in place."""
        weight.addmm_(self.left.to(weight.device), self.right.to(weight.device))

    def dense(self) -> Tensor:
        return self.left @ self.right


@dataclass(frozen=True)
class Dense:
    """delta as it is, in float32."""

    delta: Tensor  # (d_out, d_in)

    def add_to(self, weight: Tensor) -> None:
        weight.add_(self.delta.to(weight.device))

    def dense(self) -> Tensor:
        return self.delta


Delta = LowRank | Dense


@dataclass(frozen=True)
class Patch(ABC):
    """One computed change. `extra` and `info` carry what the method wants to keep (keys, values, notes).

    `extra` maps names to tensors, `info` is JSON; both are saved with the patch.
    """

    kind: ClassVar[str]
    extra: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    info: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that make the change, without `extra`."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]) -> Patch:
        """The inverse of `tensors`, `extra`, `info`."""


@dataclass(frozen=True)
class WeightPatch(Patch):
    """Deltas to weight matrices, by parameter name, in (d_out, d_in) orientation and float32."""

    kind: ClassVar[str] = "weight"
    deltas: Mapping[str, Delta]

    def tensors(self) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            if isinstance(delta, LowRank):
                parts[f"{name}:left"], parts[f"{name}:right"] = delta.left, delta.right
            else:
                parts[f"{name}:dense"] = delta.delta
        return parts

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> WeightPatch:
        deltas: dict[str, Delta] = {}
        for name in {key.rpartition(":")[0] for key in tensors}:
            found = {
                key.rpartition(":")[2]: t for key, t in tensors.items() if key.rpartition(":")[0] == name
            }
            if set(found) == {"dense"}:
                deltas[name] = Dense(found["dense"])
            elif set(found) == {"left", "right"}:
                deltas[name] = LowRank(found["left"], found["right"])
            else:
                raise EditError(
                    f"the delta of {name!r} has the parts {sorted(found)}; dense, or left and right"
                )
        return cls(dict(sorted(deltas.items())), extra=extra, info=info)


class LivePatch(Patch):
    """A patch that acts through hooks while it is attached, instead of through weights."""

    @abstractmethod
    def attach(self, lm: LM) -> Detach:
        """Attach to the model; the returned call takes it off again, leaving nothing behind."""


_KINDS: dict[str, type[Patch]] = {"weight": WeightPatch}


def register(kind: type[Patch]) -> type[Patch]:
    """Make `load` know a patch class of another family (class decorator)."""
    _KINDS[kind.kind] = kind
    return kind


def save(patch: Patch) -> bytes:
    """Serialise to safetensors bytes, the same bytes for the same patch."""
    parts = {f"t/{k}": v for k, v in patch.tensors().items()} | {f"x/{k}": v for k, v in patch.extra.items()}
    parts = {k: v.detach().cpu().contiguous() for k, v in sorted(parts.items())}
    header = {"format": FORMAT, "kind": patch.kind, "info": dict(patch.info)}
    # one metadata key, because safetensors writes several in no fixed order
    return safetensors.torch.save(parts, metadata={"errata": json.dumps(header, sort_keys=True)})


def load(data: bytes) -> Patch:
    """Read what `save` wrote. Raises EditError for anything else; never unpickles."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["errata"])
        parts = safetensors.torch.load(data)
        kind = _kind(header["kind"]) if header["format"] == FORMAT else None
        info = dict(header["info"])
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise EditError(f"this is not a patch file of format {FORMAT}: {error}") from error
    if kind is None:
        raise EditError(f"patch format {header['format']!r} is not {FORMAT}; it was made by another version")
    tensors = {k[2:]: v for k, v in parts.items() if k.startswith("t/")}
    extra = {k[2:]: v for k, v in parts.items() if k.startswith("x/")}
    try:
        return kind.from_parts(tensors, extra, info)
    except (KeyError, ValueError) as error:
        raise EditError(f"this {kind.kind} patch lacks or garbles a part: {error}") from error


def _kind(name: str) -> type[Patch]:
    """The class of a kind; the methods' own are known once the table of methods has been imported."""
    if name not in _KINDS:
        importlib.import_module("editors.table")
    return _KINDS[name]


def join_deltas(patches: Sequence[Patch]) -> dict[str, list[Delta]]:
    """The deltas of several weight patches by parameter name, in the given order."""
    joined: dict[str, list[Delta]] = {}
    for patch in patches:
        if isinstance(patch, WeightPatch):
            for name, delta in patch.deltas.items():
                joined.setdefault(name, []).append(delta)
    return joined


def rebuilt(pristine: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """cast(fp32(W0) + deltas in order): the only way a live weight is ever made.

    `pristine` is (d_out, d_in) in any dtype; the result is a new tensor of the same dtype.
    """
    weight = pristine.to(torch.float32, copy=True).contiguous()
    for delta in deltas:
        delta.add_to(weight)
    return weight.to(pristine.dtype)
