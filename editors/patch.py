"""A patch, which an editor returns: serialisable to safetensors, applied by the host alone.

A patch never holds a reference to a model. `save` here and `load` in editors/patch_kinds.py are
exact: a loaded patch gives bit-identical weights or hooks.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from editors.errors import EditError
from editors.model.deltas import Delta, Dense, LowRank
from editors.model.lm import LM

FORMAT = "errata-patch-1"
TRAINED_ON = "trained_on"  # in `Patch.info`: for each edit, the prompts it was trained on besides its own
Detach = Callable[[], None]


@dataclass(frozen=True)
class Patch(ABC):
    """One computed change. `extra` and `info` hold further data of the method (keys, values, notes).

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
            parts = {
                key.rpartition(":")[2]: t for key, t in tensors.items() if key.rpartition(":")[0] == name
            }
            if set(parts) == {"dense"}:
                deltas[name] = Dense(parts["dense"])
            elif set(parts) == {"left", "right"}:
                deltas[name] = LowRank(parts["left"], parts["right"])
            else:
                raise EditError(
                    f"the delta of {name!r} has the parts {sorted(parts)}; dense, or left and right"
                )
        return cls(dict(sorted(deltas.items())), extra=extra, info=info)


class LivePatch(Patch):
    """A patch that acts through hooks while it is attached, instead of through weights."""

    only_routes: ClassVar[bool] = False
    """It only claims prompts (`lm.routes`): what it does not claim is answered as without it."""

    @abstractmethod
    def attach(self, lm: LM) -> Detach:
        """Attach to the model; the returned call takes it off again, leaving nothing behind."""


def save(patch: Patch) -> bytes:
    """Serialise to safetensors bytes, the same bytes for the same patch."""
    parts = {f"t/{k}": v for k, v in patch.tensors().items()} | {f"x/{k}": v for k, v in patch.extra.items()}
    parts = {k: v.detach().cpu().contiguous() for k, v in sorted(parts.items())}
    header = {"format": FORMAT, "kind": patch.kind, "info": dict(patch.info)}
    # one metadata key, because safetensors writes several in no fixed order
    return safetensors.torch.save(parts, metadata={"errata": json.dumps(header, sort_keys=True)})


PatchT = TypeVar("PatchT", bound=Patch)


def with_training(patch: PatchT, prompts: Sequence[Sequence[str]]) -> PatchT:
    """The patch with the prompts it was trained on: for each of its edits, those besides the edit's own."""
    return replace(patch, info={**patch.info, TRAINED_ON: [list(each) for each in prompts]})


def with_training_of(patch: PatchT, full: Patch, rows: Sequence[int]) -> PatchT:
    """A subset of `full` that records the prompts its own rows were trained on."""
    if TRAINED_ON not in full.info:
        return patch
    return with_training(patch, [full.info[TRAINED_ON][row] for row in rows])


def trained_prompts(patch: Patch) -> frozenset[str]:
    """The prompts that the patch records as trained on, of all its edits. Raises EditError if they are garbled."""
    recorded = patch.info.get(TRAINED_ON, [])
    try:
        prompts = [prompt for each in recorded for prompt in each]
    except TypeError:
        prompts = [None]
    if not isinstance(recorded, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise EditError(f"info.{TRAINED_ON} of this patch is not a list of prompts for each edit")
    return frozenset(prompts)


def join_deltas(patches: Sequence[Patch]) -> dict[str, list[Delta]]:
    """The deltas of several weight patches by parameter name, in the given order."""
    joined: dict[str, list[Delta]] = {}
    for patch in patches:
        if isinstance(patch, WeightPatch):
            for name, delta in patch.deltas.items():
                joined.setdefault(name, []).append(delta)
    return joined


def cpu_float(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy on the CPU, as patches keep them."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
