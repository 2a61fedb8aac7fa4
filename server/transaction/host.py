"""The one owner of the live weights: pristine tensors plus a stack of patches, rebuilt, never subtracted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.model.deltas import Delta, rebuilt
from editors.model.lm import LM, hash_tensor
from editors.patch import Detach, LivePatch, Patch, WeightPatch, join_deltas


@dataclass(frozen=True)
class ActivePatch:
    """One entry of the stack: a patch of the ledger, as it is live now."""

    patch_id: int
    position: int  # its place in ledger order
    method: str
    patch: Patch
    rows: tuple[int, ...]  # active rows of the batch it came from
    blob: str  # SHA-256 of the serialised patch


class ModelHost:
    """Owns the LM, the pristine tensors and the stack of active patches. `lock` guards everything."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.lock = threading.RLock()
        self.stack: tuple[ActivePatch, ...] = ()
        self._pristine: dict[str, Tensor] = {}  # stored orientation, only of touched tensors
        self._deltas: dict[str, list[Delta]] = {}
        self._detach: list[Detach] = []
        self._hashes = _hashes_of(lm)
        self._base_hashes = dict(self._hashes)
        self.base_hash = _combined(self._base_hashes)

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the names and hashes of all live tensors."""
        return _combined(self._hashes)

    def rehash(self) -> str:
        """The same, computed anew from what the live tensors hold now; nothing is remembered of it."""
        return _combined(_hashes_of(self.lm))

    def set_stack(self, stack: Sequence[ActivePatch]) -> None:
        """Make the live model equal pristine weights + these patches, in this order."""
        self._detach_all()
        wanted = join_deltas([a.patch for a in stack])
        for name in sorted(set(self._deltas) | set(wanted)):
            self._set_deltas(name, wanted.get(name, []))
        self.stack = tuple(stack)
        self._attach_all()

    @contextmanager
    def trial(self, stack: Sequence[ActivePatch]) -> Iterator[None]:
        """Run with another stack; the former one is back at the end unless `keep` was called in between."""
        before = self.stack
        self._kept = False
        try:
            self.set_stack(stack)
            yield
        finally:
            if not self._kept:
                self.set_stack(before)

    def keep(self) -> None:
        """Let the stack of the present trial stand."""
        self._kept = True

    @contextmanager
    def pristine(self) -> Iterator[None]:
        """The model as it was loaded: pristine tensors swapped in, live patches off."""
        self._detach_all()
        try:
            with self.lm.swapped({name: self._pristine_view(name) for name in self._deltas}):
                yield
        finally:
            self._attach_all()

    def rebuild(self) -> None:
        """Make every touched tensor anew from pristine, whatever the live one holds now."""
        deltas, self._deltas = self._deltas, {}
        for name, wanted in deltas.items():
            self._set_deltas(name, wanted)

    def _set_deltas(self, name: str, wanted: list[Delta]) -> None:
        have = self._deltas.get(name, [])
        if [id(d) for d in have] == [id(d) for d in wanted]:
            return
        live = self.lm.weight(name)
        if name not in self._pristine:
            self._pristine[name] = self.lm.model.get_parameter(name).data  # never written: `put` swaps
        grows = len(have) < len(wanted) and all(a is b for a, b in zip(have, wanted, strict=False))
        if not wanted:
            new = self._pristine_view(name)
        elif have and grows and live.dtype == torch.float32:
            new = rebuilt(live, wanted[len(have) :])  # same additions in the same order: the same bits
        else:
            new = rebuilt(self._pristine_view(name), wanted)
        self.lm.put(name, new)
        self._hashes[name] = (
            self._base_hashes[name] if not wanted else hash_tensor(self.lm.model.get_parameter(name))
        )
        if wanted:
            self._deltas[name] = wanted
        else:
            self._deltas.pop(name, None)

    def _pristine_view(self, name: str) -> Tensor:
        """The pristine tensor in (d_out, d_in) orientation."""
        stored = self._pristine[name]
        return stored.t() if self.lm.is_transposed(name) else stored

    def _attach_all(self) -> None:
        for active in self.stack:
            if isinstance(active.patch, LivePatch):
                self._detach.append(active.patch.attach(self.lm))

    def _detach_all(self) -> None:
        while self._detach:
            self._detach.pop()()

    def touched(self) -> list[str]:
        """Names of the tensors that differ from the pristine ones."""
        return sorted(self._deltas)


def tensors_of(patch: Patch) -> list[str]:
    """Names of the weights a patch changes."""
    return sorted(patch.deltas) if isinstance(patch, WeightPatch) else []


def _hashes_of(lm: LM) -> dict[str, str]:
    """SHA-256 of every parameter; several at once: one after another, billions take as long as loading them."""
    names, tensors = zip(*((name, p.data) for name, p in lm.model.named_parameters()), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(names, pool.map(hash_tensor, tensors), strict=True))


def _combined(hashes: dict[str, str]) -> str:
    text = "\n".join(f"{name} {value}" for name, value in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()
