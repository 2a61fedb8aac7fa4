"""The patch of GRACE: a code book of keys, values and radii at one weight.

Where the input of one MLP's output projection lies within the radius of a key, its output is the
key's value. Everywhere else the model stays the same to the bit ("deferral" in the paper).
Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from editors.errors import EditError
from editors.model.activations import first, with_first
from editors.model.lm import LM
from editors.patch import Detach, LivePatch


@dataclass(frozen=True)
class Entries:
    """n entries of a code book, in the order they were made."""

    keys: Tensor  # (n, d_in) float32
    values: Tensor  # (n, d_out) float32
    radii: Tensor  # (n,) as first chosen
    owners: Tensor  # (n,) the edit of the call they belong to
    labels: Tensor  # (n,) the token they answer with

    def select(self, keep: Tensor) -> Entries:
        return Entries(*(getattr(self, n)[keep] for n in ("keys", "values", "radii", "owners", "labels")))


def settle(entries: Entries) -> Entries:
    """Go through the entries as they came and grow or split the radii where they meet (algorithm 1).

    Same value: the older one's radius grows over the new key. Different labels: both stop halfway, so that
    no two of them ever reach the same state.
    """
    radii, kept = entries.radii.clone(), list[int]()
    between = torch.cdist(entries.keys, entries.keys, compute_mode="donot_use_mm_for_euclid_dist")
    for i in range(len(radii)):
        near = min(kept, key=lambda j, i=i: float(between[i, j]), default=None)  # type: ignore[misc]
        if near is not None and torch.equal(entries.values[i], entries.values[near]):
            foreign = [j for j in kept if entries.labels[j] != entries.labels[near]]
            room = min((float(between[near, j] - radii[j]) for j in foreign), default=float("inf"))
            if float(between[i, near]) <= min(float(radii[i] + radii[near]), room):
                radii[near] = min(max(float(radii[near]), 1.01 * float(between[i, near])), room)
                continue
        for j in kept:
            half = 0.499 * float(between[i, j])
            if entries.labels[i] != entries.labels[j] and float(radii[i] + radii[j]) > 2 * half:
                radii[i], radii[j] = min(float(radii[i]), half), min(float(radii[j]), half)
        kept.append(i)
    index = torch.tensor(kept, dtype=torch.long)
    found = entries.select(index)
    return Entries(found.keys, found.values, radii[index], found.owners, found.labels)


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
            raise EditError(f"this is not a code book: {error}") from error

    def attach(self, lm: LM) -> Detach:
        book, weight = settle(self.entries), lm.weight(self.parameter)
        if (book.values.shape[1], book.keys.shape[1]) != tuple(weight.shape):
            raise EditError(f"the code book does not fit {self.parameter}, which is {tuple(weight.shape)}")
        handle = lm.module(self.parameter).register_forward_hook(_lookup(book, weight.device))
        return handle.remove


def _lookup(book: Entries, device: torch.device) -> Any:
    keys, values, radii = (t.to(device) for t in (book.keys, book.values, book.radii))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        out = first(output)
        queries = args[0].detach().float().reshape(-1, keys.shape[1])
        # Exact distances: the fast formula is off by more than a small radius.
        distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(dim=1)
        inside = distances.gather(1, nearest[:, None])[:, 0] <= radii[nearest]
        if not bool(inside.any()):
            return None  # deferral: not a bit is touched
        flat = out.reshape(-1, out.shape[-1]).clone()
        flat[inside] = values[nearest[inside]].to(flat.dtype)
        return with_first(output, flat.reshape(out.shape))

    return hook
