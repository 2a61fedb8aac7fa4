"""The patch of GRACE: a code book of keys, values and radii at one weight.

Where the input of one MLP's output projection lies within the radius of a key, its output becomes the
key's value. Everywhere else the model computes exactly what it did before (the paper's "deferral").
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
        handle = lm.module(self.parameter).register_forward_hook(_lookup(book, lm.place(self.parameter)))
        return handle.remove


def _lookup(book: Entries, device: torch.device) -> Any:
    keys, values, radii = (t.to(device) for t in (book.keys, book.values, book.radii))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        out = first(output)
        queries = args[0].detach().float().reshape(-1, keys.shape[1])
        # Exact distances: the error of the fast formula can exceed a small radius.
        distances = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(dim=1)
        inside = distances.gather(1, nearest[:, None])[:, 0] <= radii[nearest]
        if not bool(inside.any()):
            return None  # deferral: the output stays as it is
        flat = out.reshape(-1, out.shape[-1]).clone()
        flat[inside] = values[nearest[inside]].to(flat.dtype)
        return with_first(output, flat.reshape(out.shape))

    return hook
