"""Whatever is done, in whatever order: the ledger equals a few lines of Python that say what it means."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from store import Ledger
from tests.store.conftest import WHO, Book


@dataclass
class Slot:
    """One patch in the plain picture of the ledger."""

    source: bytes
    ids: list[str]
    active: set[str] = field(default_factory=set)
    live: bytes | None = None


class LedgerMachine(RuleBasedStateMachine):
    """Apply, reject, replace, revert, reapply, measure, reopen."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name) / "home"
        self.ledger = Ledger.open(self.home)
        self.book = Book(self.ledger)
        self.slots: dict[int, Slot] = {}
        self.weights: str | None = None
        self.count = 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def active(self) -> list[str]:
        return sorted(edit_id for slot in self.slots.values() for edit_id in slot.active)

    def passive(self) -> list[str]:
        return sorted(edit_id for slot in self.slots.values() for edit_id in set(slot.ids) - slot.active)

    def restack(self, touched: set[int]) -> dict[int, bytes | None]:
        """New bytes for every patch that keeps part of its edits; the others follow from the rules."""
        given: dict[int, bytes | None] = {}
        for patch_id in touched:
            slot = self.slots[patch_id]
            if 0 < len(slot.active) < len(slot.ids):
                self.count += 1
                slot.live = given[patch_id] = f"part {self.count}".encode()
            else:
                slot.live = slot.source if slot.active else None
        return given

    def retire(self, edit_ids: list[str]) -> dict[int, bytes | None]:
        touched = {p for p, slot in self.slots.items() if slot.active & set(edit_ids)}
        for patch_id in touched:
            self.slots[patch_id].active -= set(edit_ids)
        return self.restack(touched)

    @rule(size=st.integers(1, 3), rejected=st.booleans())
    def record(self, size: int, rejected: bool) -> None:
        patch = self.book.patch(*(f"land {self.count}.{i}" for i in range(size)))
        self.count += 1
        if rejected:
            ids = self.ledger.record_rejected(patch, ["max_drift"], WHO)
        else:
            ids = self.ledger.record_applied(patch, WHO)
            self.weights = patch.weights_hash_after
        live = None if rejected else patch.blob
        slot = Slot(patch.blob, ids, set() if rejected else set(ids), live)
        self.slots[len(self.slots) + 1] = slot

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        old = data.draw(st.lists(st.sampled_from(self.active()), min_size=1, max_size=2, unique=True))
        patch = self.book.patch("the new one")
        restack = self.retire(old)
        ids = self.ledger.record_applied(patch, WHO, replaced=old, restack=restack)
        self.slots[len(self.slots) + 1] = Slot(patch.blob, ids, set(ids), patch.blob)
        self.weights = patch.weights_hash_after
        assert {edit.status for edit in self.ledger.edits(old)} == {"replaced"}

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.active()), min_size=1, max_size=4, unique=True))
        self.count += 1
        self.weights = f"after {self.count}"
        self.ledger.record_reverted(ids, self.weights, WHO, restack=self.retire(ids))

    @precondition(lambda self: self.passive())
    @rule(data=st.data())
    def reapply(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.passive()), min_size=1, max_size=4, unique=True))
        touched = set()
        for patch_id, slot in self.slots.items():
            if chosen := set(ids) & set(slot.ids):
                slot.active |= chosen
                touched.add(patch_id)
        self.count += 1
        self.weights = f"after {self.count}"
        measured = {edit_id: {"reliability": 1.0} for edit_id in ids}
        self.ledger.record_reapplied(
            ids, self.weights, WHO, measurements=measured, restack=self.restack(touched)
        )

    @precondition(lambda self: self.active())
    @rule()
    def measure(self) -> None:
        self.ledger.record_measurements(
            {i: {"locality": 0.5} for i in self.active()}, "audit", {"kl": 0.1}, WHO
        )

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = self.book.ledger = Ledger.open(self.home)

    @invariant()
    def the_stack_is_what_was_left_active(self) -> None:
        if not hasattr(self, "ledger"):
            return
        stack = [
            (
                entry.patch_id,
                entry.edit_ids,
                {entry.edit_ids[row] for row in entry.rows},
                self.ledger.blobs.get(entry.blob),
            )
            for entry in self.ledger.stack(self.book.model)
        ]
        expected = [(p, tuple(s.ids), s.active, s.live) for p, s in sorted(self.slots.items()) if s.active]
        assert stack == expected
        assert self.ledger.expected_weights_hash(self.book.model) == self.weights

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "ledger"):
            assert self.ledger.verify() == []


LedgerMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTheLedger = LedgerMachine.TestCase
