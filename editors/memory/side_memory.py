"""The patch of WISE: side memories of one weight, and the router that decides where they act.

Wang et al., NeurIPS 2024, arXiv 2405.14768.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from editors.errors import EditError
from editors.model.activations import first, with_first
from editors.model.lm import LM
from editors.patch import Detach, LivePatch


@dataclass(frozen=True)
class Memories:
    """n memories with m columns in all: (W'_i - W) k is the sum of left_j (right_j . k) over the columns j of i."""

    left: Tensor  # (m, d_out) float32
    right: Tensor  # (m, d_in) float32
    owners: Tensor  # (m,) index of the edit that each column belongs to
    thresholds: Tensor  # (n,) routing activation over which each memory acts

    def select(self, rows: Sequence[int]) -> Memories:
        """These edits' memories, renumbered."""
        index = torch.cat([(self.owners == r).nonzero()[:, 0] for r in rows])
        number = {r: i for i, r in enumerate(rows)}
        owners = torch.tensor([number[int(o)] for o in self.owners[index]])
        return Memories(self.left[index], self.right[index], owners, self.thresholds[list(rows)])

    @classmethod
    def join(cls, singles: Sequence[Memories]) -> Memories:
        """Several objects with one memory each, as one."""
        owners = torch.cat([torch.full_like(m.owners, i) for i, m in enumerate(singles)])
        left, right, thresholds = (
            torch.cat([getattr(m, n) for m in singles]) for n in ("left", "right", "thresholds")
        )
        return cls(left, right, owners, thresholds)


@dataclass(frozen=True)
class SideMemoryPatch(LivePatch):
    """Side memories of one weight; act while attached."""

    kind: ClassVar[str] = "sidememory"
    parameter: str
    memories: Memories = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self.memories))

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> SideMemoryPatch:
        try:
            return cls(info["parameter"], Memories(**tensors), extra=extra, info=info)
        except (TypeError, KeyError) as error:
            raise EditError(f"this patch is not a side memory: {error}") from error

    def attach(self, lm: LM) -> Detach:
        shape, memories = lm.shape(self.parameter), self.memories
        if (memories.left.shape[1], memories.right.shape[1]) != shape:
            raise EditError(f"the side memory does not fit {self.parameter}, which is {shape}")
        module = lm.module(self.parameter)
        if module not in _ROUTERS:
            _ROUTERS[module] = _Router(module, lm.place(self.parameter))
        return _ROUTERS[module].add(memories)


class _Router:
    """Forward hook of a module: each memory adds its change where its own activation is over its threshold.

    In the paper only the most active memory answers. Here the changes of two facts about one subject add up (and one
    may outweigh the other, as they are two values for one key). All patches of a module share its router, so that
    hundreds of them cost little more than one.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.handle = module.register_forward_hook(self)
        self.patches: list[Memories] = []
        self.packed = False  # packed at the next forward pass, as patches mostly come and go in groups

    def add(self, memories: Memories) -> Detach:
        """Add memories; returns how to remove them. Removing the last ones removes the hook."""
        self.patches.append(memories)
        self.packed = False

        def remove() -> None:
            self.patches = [m for m in self.patches if m is not memories]
            self.packed = False
            if not self.patches:
                self.handle.remove()
                if _ROUTERS.get(self.module) is self:
                    del _ROUTERS[self.module]

        return remove

    def _pack(self) -> None:
        owners, count = [], 0
        for memories in self.patches:
            owners.append(memories.owners + count)
            count += len(memories.thresholds)
        self.left, self.right, self.thresholds = (
            torch.cat([getattr(m, n) for m in self.patches]).to(self.device)
            for n in ("left", "right", "thresholds")
        )
        self.owners = torch.cat(owners).to(self.device)
        self._pack_blocks()
        self.packed = True

    def _pack_blocks(self) -> None:
        """||L_i^T h||^2 = h^T (L_i L_i^T) h: one small matrix for each memory, all as wide as the widest."""
        counts = torch.bincount(self.owners, minlength=len(self.thresholds))
        order = self.owners.argsort(stable=True)
        within = (
            torch.arange(len(order), device=self.device) - (counts.cumsum(0) - counts)[self.owners[order]]
        )
        shape = (len(self.thresholds), int(counts.max()))
        self.columns = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.columns[self.owners[order], within] = order
        mask = torch.zeros(shape, device=self.device)
        mask[self.owners[order], within] = 1.0
        blocks = self.left[self.columns] * mask[..., None]  # (n, widest, d_out)
        self.grams = blocks @ blocks.transpose(1, 2)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.packed:
            self._pack()
        out = first(output)
        coordinates = (
            args[0].detach().float().reshape(-1, self.right.shape[1]) @ self.right.t()
        )  # (tokens, m)
        blocks = coordinates[:, self.columns]  # (tokens, n, widest)
        squares = (torch.einsum("tni,nij->tnj", blocks, self.grams) * blocks).sum(-1)
        active = squares > self.thresholds.square()  # (tokens, n)
        tokens = active.any(1)
        if not bool(tokens.any()):
            return None  # the output stays as it is
        change = (coordinates[tokens] * active[tokens][:, self.owners]) @ self.left
        flat = out.reshape(-1, out.shape[-1]).clone()
        flat[tokens] = (flat[tokens].float() + change.to(flat.device)).to(flat.dtype)
        return with_first(output, flat.reshape(out.shape))


_ROUTERS: WeakKeyDictionary[nn.Module, _Router] = WeakKeyDictionary()
