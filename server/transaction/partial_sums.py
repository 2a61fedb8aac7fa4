"""Sums of the first deltas of a weight, kept so that a change late in a long stack adds only what comes after it.

A weight is always cast(fp32(W0) + deltas in order), and floating point depends on the order. What is kept are sums of
the first deltas, so that continuing from one gives the bits that adding all of them gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from editors.constants import limit
from editors.model.deltas import Delta

STEP = limit(
    32,
    "deltas between the places where a sum can be kept",
    "time against memory: adding so many takes some 3 ms; the bits do not depend on it",
)
MOST = limit(
    8,
    "sums that are kept of one weight, at most; the further from the end, the further apart",
    "memory: other sums are computed again; the bits do not depend on it",
)
MOST_BYTES = limit(
    256 * 2**20,
    "bytes of all sums together, on the devices of their weights, at most",
    "memory: 72 sums of weights of the default model; other sums are computed again",
)


@dataclass(frozen=True)
class _Sum:
    deltas: tuple[ReferenceType[Delta], ...]  # not kept alive: they can be as large as the weight
    total: Tensor  # (d_out, d_in) float32

    @classmethod
    def of(cls, deltas: Sequence[Delta], total: Tensor) -> _Sum:
        return cls(tuple(map(ref, deltas)), total)

    @property
    def is_of_use(self) -> bool:
        """Whether all of its deltas are still held somewhere."""
        return all(delta() is not None for delta in self.deltas)

    def begins(self, wanted: Sequence[Delta]) -> bool:
        """Whether these are the first of the wanted ones."""
        return len(self.deltas) <= len(wanted) and all(
            mine() is theirs for mine, theirs in zip(self.deltas, wanted, strict=False)
        )

    @property
    def bytes(self) -> int:
        return self.total.numel() * self.total.element_size()


class PartialSums:
    """The sums of every changed weight of one model."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._kept: dict[str, list[_Sum]] = {}  # by weight, the longest last
        self._most_bytes = most_bytes

    def rebuilt(
        self, name: str, pristine: Tensor, deltas: Sequence[Delta], had: tuple[Sequence[Delta], Tensor] | None
    ) -> Tensor:
        """The same bits as `editors.model.deltas.rebuilt`: a new tensor of pristine's shape (d_out, d_in) and dtype.

        `had`: the deltas in the live weight, and that weight; it is a sum itself where it is float32.
        """
        sums = [each for each in self._kept.get(name, ()) if each.begins(deltas)]
        if had is not None and had[1].dtype == torch.float32:
            live = _Sum.of(*had)
            sums += [live] if live.begins(deltas) else []
        start = max(sums, key=lambda each: len(each.deltas), default=_Sum((), pristine))
        weight = start.total.to(torch.float32, copy=True).contiguous()
        ends = pristine.dtype != torch.float32  # a live float32 weight is a sum itself
        places = self._places(name, weight, len(start.deltas), len(deltas), ends=ends)
        new = []
        for i, delta in enumerate(deltas[len(start.deltas) :], len(start.deltas) + 1):
            delta.add_to(weight)
            if i in places:
                new.append(_Sum.of(deltas[:i], weight.clone()))
        self._keep(name, new, places)
        return weight.to(pristine.dtype)

    def clear(self) -> None:
        """Let go of all sums."""
        self._kept.clear()

    def forget(self, name: str) -> None:
        """Let go of the sums of one weight."""
        self._kept.pop(name, None)

    def _places(self, name: str, weight: Tensor, start: int, end: int, *, ends: bool) -> list[int]:
        """Which sums will be kept, each by its number of deltas.

        They are chosen in advance, so that no other sum is copied. Empty if sums of a weight of this size take too
        much memory.
        """
        if weight.numel() * weight.element_size() * MOST > self._most_bytes:
            return []
        places = {len(each.deltas) for each in self._kept.get(name, ()) if each.is_of_use}
        for i in range(start + 1, end + 1):
            if i % STEP == 0 or (ends and i == end > STEP):
                places.add(i)
                if len(places) > MOST:
                    in_order = sorted(places)
                    places.remove(in_order[_least_missed(in_order, end)])
        return sorted(places)

    def _keep(self, name: str, new: Sequence[_Sum], places: Sequence[int]) -> None:
        """Keep new sums of a weight, and those of its former sums that are still among `places`."""
        if not new:
            return
        lengths = {len(each.deltas) for each in new}
        wanted = set(places) - lengths
        others = [each for each in self._kept.pop(name, ()) if each.is_of_use and len(each.deltas) in wanted]
        # the weight that was used last stands last
        self._kept[name] = sorted([*others, *new], key=lambda each: len(each.deltas))
        while self._bytes > self._most_bytes:
            del self._kept[next(iter(self._kept))]

    @property
    def _bytes(self) -> int:
        return sum(each.bytes for sums in self._kept.values() for each in sums)


def _least_missed(places: Sequence[int], end: int) -> int:
    """The index of the place that is missed least when it is dropped; never the last one.

    Dropping a place leaves a gap between its neighbours. A gap counts less the farther it is from the end, because
    most changes happen near the end.
    """
    before = [0, *places]

    def gap(i: int) -> float:
        return (places[i + 1] - before[i]) / (max(end - before[i], 0) + STEP)

    return min(range(len(places) - 1), key=gap)
