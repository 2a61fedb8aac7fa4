"""Everything that changes the ledger. Each method is one transaction with the event that tells of it.

Patch files are on the disk before the row that names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from store.canonical import now
from store.chain import NewEvent, append_event, tidy
from store.changes import (
    Measurements,
    check_states,
    edits_of,
    insert,
    insert_measurements,
    restack_patches,
    set_status,
    vouch,
)
from store.connection import Connection
from store.errors import LedgerError
from store.history import CHANGING, RECORDING
from store.patches import Attempt, add_patch, check_patch
from store.records import NOBODY, NewPatch, RecordedPatch, Who
from store.vectors import VECTOR_EVENTS

Restack = Mapping[int, bytes | None]
_RESERVED = frozenset({*RECORDING, *CHANGING, *VECTOR_EVENTS, "measured"})


class Recording(Connection):
    """The writing half of the ledger."""

    def find_model(self, base_hash: str) -> int | None:
        """Id of the model with these pristine weights, None when the ledger has not seen it."""
        row = self._row("SELECT id FROM models WHERE base_hash = ?", (base_hash,))
        return None if row is None else int(row["id"])

    def model(self, base_hash: str, name: str, architecture: str) -> int:
        """Id of the model with these pristine weights, made when it is new (or LedgerReadOnly)."""
        known = self.find_model(base_hash)
        if known is not None:
            return known
        with self._write() as db:
            values = {
                "name": tidy(name),
                "base_hash": base_hash,
                "architecture": architecture,
                "created": now(),
            }
            return insert(db, "models", values)

    def record_patches(
        self,
        patches: Sequence[NewPatch],
        who: Who = NOBODY,
        *,
        replaced: Sequence[str] = (),
        restack: Restack | None = None,
    ) -> list[RecordedPatch]:
        """Record applied patches, all of them or none, in the order they are added to the weights.

        `replaced` are active edits that the first patch retires. `restack` gives the new live bytes of
        earlier patches that changed because of that (see `record_reverted`). Raises WrongState,
        NoSuchEdit, LedgerReadOnly or LedgerError, with nothing recorded.
        """
        return self._add(patches, Attempt(who, now()), replaced, restack or {})

    def record_applied(
        self,
        patch: NewPatch,
        who: Who = NOBODY,
        *,
        replaced: Sequence[str] = (),
        restack: Restack | None = None,
    ) -> list[str]:
        """`record_patches` for one patch; returns the ids of its edits, in the order of its requests."""
        [recorded] = self.record_patches([patch], who, replaced=replaced, restack=restack)
        return list(recorded.edit_ids)

    def record_rejected(self, patch: NewPatch, failed: Sequence[str], who: Who = NOBODY) -> list[str]:
        """Record an attempt that broke the bounds named in `failed`; its patch and measurements are kept."""
        [recorded] = self._add([patch], Attempt(who, now(), failed), (), {})
        return list(recorded.edit_ids)

    def record_reverted(
        self,
        edit_ids: Sequence[str],
        weights_hash: str,
        who: Who = NOBODY,
        *,
        reason: str | None = None,
        restack: Restack | None = None,
        state_hash: str | None = None,
        drift: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that active edits were taken back.

        `restack` maps patch ids to the bytes live from now on. It must name every patch of which some
        edits stay active and others do not; one with none active has no live bytes, and one with all
        active gets those it was computed with, without being named. Raises WrongState, NoSuchEdit.
        """
        new = NewEvent(
            kind="reverted",
            edit_ids=edit_ids,
            reason=reason,
            weights_hash=weights_hash,
            state_hash=state_hash,
        )
        self._change(new, ("active",), who, restack or {}, "revert", {}, drift)

    def record_reapplied(
        self,
        edit_ids: Sequence[str],
        weights_hash: str,
        who: Who = NOBODY,
        *,
        measurements: Measurements | None = None,
        reason: str | None = None,
        restack: Restack | None = None,
        state_hash: str | None = None,
        drift: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that reverted, replaced or rejected edits are active again, in their old place.

        `restack` as in `record_reverted`. Raises WrongState, NoSuchEdit.
        """
        new = NewEvent(
            kind="reapplied",
            edit_ids=edit_ids,
            reason=reason,
            weights_hash=weights_hash,
            state_hash=state_hash,
        )
        came_from = ("reverted", "replaced", "rejected")
        self._change(new, came_from, who, restack or {}, "reapply", measurements or {}, drift)

    def record_measurements(
        self,
        measurements: Measurements,
        occasion: str,
        drift: Mapping[str, Any] | None = None,
        who: Who = NOBODY,
        *,
        model_id: int | None = None,
    ) -> None:
        """Record how edits hold now, by id, and how far the model has moved.

        `model_id` is needed where no edit is named. Raises NoSuchEdit.
        """
        edit_ids = list(measurements)
        with self._write() as db:
            edits = edits_of(db, edit_ids)
            model_id = edits[0]["model_id"] if edits else model_id
            if drift is not None and model_id is None:
                raise LedgerError("drift was given without an edit or a model_id to say of which model")
            payload = vouch(occasion, measurements, drift)
            new = NewEvent(kind="measured", payload=payload, model_id=model_id, edit_ids=edit_ids)
            insert_measurements(db, append_event(db, new, who, now()), measurements)

    def record_event(
        self,
        kind: str,
        payload: Mapping[str, Any],
        who: Who = NOBODY,
        *,
        model_id: int | None = None,
        edit_ids: Sequence[str] = (),
        reason: str | None = None,
    ) -> int:
        """Record anything else worth remembering; returns the event's number. Raises NoSuchEdit."""
        if kind in _RESERVED:
            raise LedgerError(f"events of kind {kind!r} have a method of their own; use that")
        new = NewEvent(kind=kind, payload=payload, model_id=model_id, edit_ids=edit_ids, reason=reason)
        with self._write() as db:
            edits_of(db, edit_ids)
            return int(append_event(db, new, who, now())["seq"])

    def _add(
        self, patches: Sequence[NewPatch], attempt: Attempt, replaced: Sequence[str], restack: Restack
    ) -> list[RecordedPatch]:
        if not patches:
            raise LedgerError("no patch was given to record")
        for patch in patches:
            check_patch(patch)
        with self._new_files() as put:
            blobs = [put(patch.blob) for patch in patches]
            live = _put_all(put, restack)
            with self._write() as db:
                first = add_patch(db, attempt, patches[0], blobs[0], replaced, live)
                others = zip(patches[1:], blobs[1:], strict=True)
                return [first, *(add_patch(db, attempt, patch, blob) for patch, blob in others)]

    def _change(
        self,
        new: NewEvent,
        came_from: Sequence[str],
        who: Who,
        restack: Restack,
        occasion: str,
        measurements: Measurements,
        drift: Mapping[str, Any] | None,
    ) -> None:
        if not new.edit_ids:
            raise LedgerError("no edit was named")
        if stray := set(measurements) - set(new.edit_ids):
            raise LedgerError(f"measurements of {', '.join(sorted(stray))}, which are not being {new.kind}")
        with self._new_files() as put:
            live = _put_all(put, restack)
            with self._write() as db:
                at = now()
                edits = edits_of(db, new.edit_ids)
                check_states(edits, came_from, new.kind)
                model_id = edits[0]["model_id"]
                touched = set_status(db, edits, CHANGING[new.kind], at, {})
                payload = {
                    "live": restack_patches(db, model_id, touched, live),
                    **vouch(occasion, measurements, drift),
                }
                event = append_event(db, replace(new, payload=payload, model_id=model_id), who, at)
                insert_measurements(db, event, measurements)


def _put_all(put: Callable[[bytes], str], restack: Restack) -> dict[int, str | None]:
    return {patch_id: None if data is None else put(data) for patch_id, data in restack.items()}
