"""The patch of GRACE: a code book of keys, values and radii at one weight.

Where the input of one MLP's output projection lies within the radius of a key, its output becomes the
key's value. Everywhere else the model computes exactly what it did before (the paper's "deferral").
Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from editors.errors import EditError
from editors.model.activations import first, with_first
from editors.model.lm import LM
from editors.patch import Detach, LivePatch

GROWTH = 1.01  # a radius that grows over a key ends a little past it
HALF = 0.499  # of the distance; below a half, so that two split radii do not touch


@dataclass(frozen=True)
class Entries:
    """n entries of a code book, oldest first."""

    keys: Tensor  # (n, d_in) float32
    values: Tensor  # (n, d_out) float32
    radii: Tensor  # (n,) before `settle`
    owners: Tensor  # (n,) index of the edit that each belongs to
    labels: Tensor  # (n,) id of the token that the value predicts

    def select(self, index: Tensor) -> Entries:
        return Entries(*(getattr(self, n)[index] for n in ("keys", "values", "radii", "owners", "labels")))


def settle(entries: Entries) -> Entries:
    """Grow or split the radii where entries meet, in the order the entries were added (algorithm 1).

    Where two entries have the same value, the older one's radius grows over the new key. Where their labels
    differ, both radii end halfway, so that no two of them contain the same state.
    """
    radii, settled = entries.radii.clone(), list[int]()
    distance = torch.cdist(entries.keys, entries.keys, compute_mode="donot_use_mm_for_euclid_dist")
    for i in range(len(radii)):
        nearest = min(settled, key=lambda j, i=i: float(distance[i, j]), default=None)  # type: ignore[misc]
        if nearest is not None and torch.equal(entries.values[i], entries.values[nearest]):
            different = [j for j in settled if entries.labels[j] != entries.labels[nearest]]
            room = min((float(distance[nearest, j] - radii[j]) for j in different), default=float("inf"))
            if float(distance[i, nearest]) <= min(float(radii[i] + radii[nearest]), room):
                radii[nearest] = min(max(float(radii[nearest]), GROWTH * float(distance[i, nearest])), room)
                continue
        for j in settled:
            half = HALF * float(distance[i, j])
            if entries.labels[i] != entries.labels[j] and float(radii[i] + radii[j]) > 2 * half:
                radii[i], radii[j] = min(float(radii[i]), half), min(float(radii[j]), half)
        settled.append(i)
    index = torch.tensor(settled, dtype=torch.long)
    chosen = entries.select(index)
    return Entries(chosen.keys, chosen.values, radii[index], chosen.owners, chosen.labels)


@dataclass(frozen=True)
class CodeBookPatch(LivePatch):
    """A code book at one weight; acts while attached."""

    kind: ClassVar[str] = "codebook"
    parameter: str
    entries: Entries = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self.entries))

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> CodeBookPatch:
        try:
            return cls(info["parameter"], Entries(**tensors), extra=extra, info=info)
        except (TypeError, KeyError) as error:
            raise EditError(f"this patch is not a code book: {error}") from error

    def attach(self, lm: LM) -> Detach:
        book, shape = settle(self.entries), lm.shape(self.parameter)
        if (book.values.shape[1], book.keys.shape[1]) != shape:
            raise EditError(f"the code book does not fit {self.parameter}, which is {shape}")
        return _shelf_of(lm.module(self.parameter), lm.place(self.parameter)).add(book)


class _Shelf:
    """Forward hook of a module for all code books that are attached to it one after another.

    A later book wins. One matrix product finds the books that may have an input; only those are measured exactly, so
    that thousands of books cost little more than one.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.handle = module.register_forward_hook(self)
        self.books: list[Entries] = []
        self.packed = False  # packed at the next forward pass, as patches mostly come and go in groups

    @property
    def is_last(self) -> bool:
        """Whether no other hook of the module runs after it."""
        return bool(next(reversed(self.module._forward_hooks), None) == self.handle.id)

    def add(self, book: Entries) -> Detach:
        """Add a book; returns how to remove it. Removing the last one removes the hook."""
        self.books.append(book)
        self.packed = False

        def remove() -> None:
            self.books = [b for b in self.books if b is not book]
            self.packed = False
            if not self.books:
                self.handle.remove()
                if _SHELVES.get(self.module) is self:
                    del _SHELVES[self.module]

        return remove

    def _pack(self) -> None:
        self.keys = torch.cat([b.keys for b in self.books]).to(self.device)
        self.squares = self.keys.square().sum(1)
        radii = torch.cat([b.radii for b in self.books]).to(self.device)
        self.reach = radii.clamp(min=0).square()
        owners = [torch.full((len(b.keys),), i) for i, b in enumerate(self.books)]
        self.owners = torch.cat(owners).to(self.device)
        self.packed = True

    def near(self, queries: Tensor) -> list[int]:
        """The books that may have one of the queries (n, d_in): all that have, and few others."""
        squares = queries.square().sum(1)[:, None]
        # |q - k|^2 by the fast formula, less what rounding can make of it
        error = 4 * queries.shape[1] * torch.finfo(torch.float32).eps
        apart = squares + self.squares - 2 * queries @ self.keys.t() - error * (squares + self.squares)
        found: list[int] = torch.unique(self.owners[(apart <= self.reach).any(0)]).tolist()
        return found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.packed:
            self._pack()
        out = first(output)
        queries = args[0].detach().float().reshape(-1, self.keys.shape[1])
        flat: Tensor | None = None
        for i in self.near(queries):
            book = self.books[i]
            keys, values, radii = (t.to(self.device) for t in (book.keys, book.values, book.radii))
            # Exact distances: the error of the fast formula can exceed a small radius.
            distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.argmin(dim=1)
            inside = distances.gather(1, nearest[:, None])[:, 0] <= radii[nearest]
            if bool(inside.any()):
                flat = out.reshape(-1, out.shape[-1]).clone() if flat is None else flat
                flat[inside] = values[nearest[inside]].to(flat.dtype)
        # deferral: where no book has an input, the output stays as it is
        return None if flat is None else with_first(output, flat.reshape(out.shape))


_SHELVES: WeakKeyDictionary[nn.Module, _Shelf] = WeakKeyDictionary()


def _shelf_of(module: nn.Module, device: torch.device) -> _Shelf:
    """Where the next book of a module belongs: what was attached to the module in between acts before it."""
    shelf = _SHELVES.get(module)
    if shelf is None or not shelf.is_last:
        shelf = _SHELVES[module] = _Shelf(module, device)
    return shelf
