"""The only owner of the live weights: pristine tensors plus a stack of patches.

Weights are rebuilt from the pristine ones, never subtracted: floating point does not undo.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.closed_form.neurons import refuse_shared_neurons
from editors.errors import EditError
from editors.model.deltas import Delta
from editors.model.lm import LM, hash_tensor
from editors.model.quantised import SideCar, hashes_of
from editors.model.weights import Live
from editors.patch import Detach, LivePatch, Patch, join_deltas
from server.transaction.model_lock import ModelLock, ModelWatch
from server.transaction.partial_sums import PartialSums


@dataclass(frozen=True)
class ActivePatch:
    """One entry of the stack: a patch of the ledger that acts on the live model."""

    patch_id: int
    position: int  # its place in ledger order
    method: str
    patch: Patch
    rows: tuple[int, ...]  # active rows of the batch it came from
    blob: str  # SHA-256 of the serialised patch

    @property
    def acts_beside(self) -> bool:
        """Whether it acts beside the weights and changes none of them."""
        return self.patch.kind != "weight"


@dataclass(frozen=True)
class HostState:
    """The live model at one moment: its stack, and what the stack made of the weights."""

    stack: tuple[ActivePatch, ...]
    deltas: Mapping[str, list[Delta]]
    hashes: Mapping[str, str]
    tensors: Mapping[str, Live]  # as stored; only those that differ from the pristine ones


class ModelHost:
    """Owns the LM, the pristine tensors and the stack of active patches. `lock` guards all of them."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self._watch = ModelWatch(lm)
        self.lock = ModelLock(self._watch)
        self.stack: tuple[ActivePatch, ...] = ()
        self.open_transactions = 0
        self.began: HostState | None = None  # the recorded state, while an open transaction may have left it
        self._view: HostState | None = None  # the live state, in a pristine view
        self._pristine: dict[str, Live] = {}  # as stored; only weights that a patch has changed
        self._deltas: dict[str, list[Delta]] = {}
        self._sums = PartialSums()
        self._attached: list[Detach] = []
        self._hashes = lm.hashes()
        self._base_hashes = dict(self._hashes)
        self.base_hash = _combined(self._base_hashes)

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the names and hashes of all live tensors."""
        return _combined(self._hashes)

    def rehash(self) -> str:
        """The same hash, computed from what the live tensors hold now."""
        return _combined(self.lm.hashes())

    def borrowed(self) -> list[str]:
        """What is borrowed from the model right now, beside a pristine view; see server.transaction.model_lock."""
        open_one = ["a transaction is open"] if self.open_transactions else []
        return open_one + self._watch.differences()

    @property
    def has_hooks(self) -> bool:
        """Whether anything acts inside the model now. It may remember the beginning of the texts that are written."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.lm.model.modules())

    @property
    def unedited(self) -> bool:
        """Whether nothing but memories is active, so that the model computes as it was loaded."""
        return all(isinstance(a.patch, LivePatch) and a.patch.only_routes for a in self.stack)

    def set_stack(self, stack: Sequence[ActivePatch]) -> None:
        """Make the live model equal the pristine weights plus these patches, in this order.

        All or nothing: if a patch does not fit, weights, hashes and live patches are as before.

        Raises:
            EditError: a patch changes a tensor that the model does not have, or that it shares with another; or two
                patches have taken over the same neurons.
        """
        refuse_shared_neurons(active.patch for active in stack)
        before = self.snapshot()
        try:
            self._build(stack)
        except BaseException:
            self.restore(before)
            raise

    def snapshot(self) -> HostState:
        """The present state. Holds the changed tensors themselves, so that `restore` computes nothing."""
        tensors = {name: self.lm.live(name) for name in self._deltas}
        return HostState(self.stack, dict(self._deltas), dict(self._hashes), tensors)

    def restore(self, state: HostState) -> None:
        """Go back to a state. Nothing is computed for it, so that it cannot run out of memory."""
        self._detach_all()
        for name in {*self._deltas, *state.deltas}:
            live = state.tensors.get(name, self._pristine.get(name))
            if live is not None:
                self.lm.set_live(name, live)
        self._deltas, self._hashes, self.stack = dict(state.deltas), dict(state.hashes), state.stack
        self._attach_all()
        self._watch.note()

    def _build(self, stack: Sequence[ActivePatch]) -> None:
        self._detach_all()
        wanted = join_deltas([a.patch for a in stack])
        for name in sorted(set(self._deltas) | set(wanted)):
            self._set_deltas(name, wanted.get(name, []))
        self.stack = tuple(stack)
        self._attach_all()
        self._watch.note()

    @contextmanager
    def pristine(self) -> Iterator[None]:
        """Run with the model as it was loaded: pristine tensors, live patches off."""
        if self._view is not None:
            yield
            return
        self._view = self.snapshot()
        try:
            with self.lm.held({name: self._pristine[name] for name in self._deltas}):
                self._hide()
                yield
        finally:
            self._view = None
            self._attach_all()
            self._watch.note()

    def _hide(self) -> None:
        self._detach_all()
        for name in self._deltas:
            self.lm.set_live(name, self._pristine[name])
        self._watch.note()

    @contextmanager
    def recorded(self) -> Iterator[bool]:
        """In the middle of a turn: lend the model as the ledger has it, whatever is staged, viewed or switched off.

        Nothing is computed for it, and afterwards everything is as before. Yields False, and leaves the model as it
        is, if more is borrowed: hooks, replaced modules, weights in another precision.
        """
        with self._watch.acting():
            if self._watch.differences():
                yield False
                return
            began, view = self.began, self._view
            now = view or self.snapshot()
            self.began = self._view = None
            try:
                if began or view:
                    self.restore(began or now)
                yield True
            finally:
                self.began, self._view = began, view
                if began or view:
                    self.restore(now)
                if view:
                    self._hide()

    @contextmanager
    def as_of(self, state: HostState) -> Iterator[None]:
        """The model as it was at the moment of a snapshot; afterwards as it is. Nothing is computed for it."""
        if self.stack is state.stack:
            yield
            return
        now = self.snapshot()
        self.restore(state)
        try:
            yield
        finally:
            self.restore(now)

    def rebuild(self) -> None:
        """Compute every changed tensor again from its pristine one, whatever the live one holds now."""
        deltas, self._deltas = self._deltas, {}
        self._sums.clear()
        for name, wanted in deltas.items():
            self._set_deltas(name, wanted)
        self._watch.note()

    def _set_deltas(self, name: str, wanted: list[Delta]) -> None:
        have = self._deltas.get(name, [])
        if [id(d) for d in have] == [id(d) for d in wanted]:
            return
        if name not in self._base_hashes:
            raise EditError(
                f"{name} is not a weight of its own in this model (it is missing, or tied to another weight, as a "
                "language-model head is to the embeddings); leave it out of the patch"
            )
        live = self.lm.live(name)
        pristine = self._pristine.setdefault(name, live)  # live tensors are swapped, never written to
        new = self._rebuilt(name, pristine, live, have, wanted) if wanted else pristine
        if not wanted:
            self._sums.forget(name)
        if wanted:  # noted before the weight changes, so that whatever raises from here on is undone
            self._deltas[name] = wanted
        else:
            self._deltas.pop(name, None)
        self.lm.set_live(name, new)
        self._hashes[name] = self._hash(name) if wanted else self._base_hashes[name]

    def _hash(self, name: str) -> str:
        live = self.lm.live(name)
        return live.digest(self._base_hashes[name]) if isinstance(live, SideCar) else hash_tensor(live)

    def _rebuilt(self, name: str, pristine: Live, live: Live, have: list[Delta], wanted: list[Delta]) -> Live:
        """The pristine weight with deltas on it; of a plain one, from a sum that is kept or live."""
        if isinstance(pristine, SideCar) or isinstance(live, SideCar):
            return self.lm.rebuilt(name, pristine, wanted)
        base = self.lm.as_matrix(name, pristine)
        is_sum = have and live.dtype == torch.float32
        new = self._sums.rebuilt(
            name, base, wanted, (have, self.lm.as_matrix(name, live)) if is_sum else None
        )
        return self.lm.as_stored(name, new)

    def _attach_all(self) -> None:
        for active in self.stack:
            if isinstance(active.patch, LivePatch):
                self._attached.append(active.patch.attach(self.lm))

    def _detach_all(self) -> None:
        while self._attached:
            self._attached.pop()()

    def changed_tensors(self) -> list[str]:
        """Names of the tensors that differ from the pristine ones."""
        return sorted(self._deltas)


def hash_of_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and hashes of all weights of a model."""
    return _combined(hashes_of(weights))


def _combined(hashes: dict[str, str]) -> str:
    text = "\n".join(f"{name} {value}" for name, value in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()
