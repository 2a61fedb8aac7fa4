"""The methods that change the ledger. Each is one transaction together with its event.

Patch files are on the disk before the rows that name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from store.canonical import json_value, now
from store.chain import NewEvent, append_event
from store.changes import (
    Measurements,
    check_states,
    edits_of,
    insert,
    insert_measurements,
    measurement_digests,
    next_number,
    restack_patches,
    set_status,
)
from store.connection import Connection, Put
from store.errors import LedgerError
from store.fact_sets import FACT_SET_EVENTS
from store.history import CHANGING, COMPACTED, MODEL, RECORDING
from store.made_files import MADE_EVENTS
from store.patches import PatchesOfCall, add_patch, check_patch
from store.proposals import PROPOSAL_EVENTS, approve
from store.records import NOBODY, Approval, Json, NewPatch, RecordedPatch, Who
from store.vectors import VECTOR_EVENTS

Restack = Mapping[int, bytes | None]
_RESERVED = frozenset(
    {
        MODEL,
        *RECORDING,
        *CHANGING,
        *VECTOR_EVENTS,
        *FACT_SET_EVENTS,
        *PROPOSAL_EVENTS,
        *MADE_EVENTS,
        COMPACTED,
        "measured",
    }
)


class Recording(Connection):
    """The methods of the ledger that record changes."""

    def find_model(self, base_hash: str) -> int | None:
        """Id of the model with these pristine weights, or None."""
        row = self._row("SELECT id FROM models WHERE base_hash = ?", (base_hash,))
        return None if row is None else int(row["id"])

    def model(self, base_hash: str, name: str, architecture: str) -> int:
        """Id of the model with these pristine weights; added if it is new. Raises LedgerReadOnly."""
        known = self.find_model(base_hash)
        if known is not None:
            return known
        with self._write() as db:
            at = now()
            about = {"name": name, "base_hash": base_hash, "architecture": architecture, "created": at}
            row = {"id": next_number(db, "models", "id"), **json_value(about)}
            model_id = insert(db, "models", row)
            append_event(db, NewEvent(kind=MODEL, payload=about, model_id=model_id), NOBODY, at)
            return model_id

    def record_patches(
        self,
        patches: Sequence[NewPatch],
        who: Who = NOBODY,
        *,
        replaced: Sequence[str] = (),
        restack: Restack | None = None,
        approval: Approval | None = None,
    ) -> list[RecordedPatch]:
        """Record applied patches, all of them or none, in the order they are added to the weights.

        `approval`: the proposal that they carry out; its decision is recorded in the same transaction.

        `replaced` are active edits that the first patch retires. `restack` gives the new live bytes of
        earlier patches that changed because of that (see `record_reverted`). Raises WrongState,
        NoSuchEdit, LedgerReadOnly or LedgerError, with nothing recorded.
        """
        return self._add(patches, PatchesOfCall(who, now()), replaced, restack or {}, approval)

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
        """Record a patch that broke the bounds named in `failed`; its file and measurements are kept."""
        [recorded] = self._add([patch], PatchesOfCall(who, now(), failed), (), {})
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
        """Record that active edits were reverted.

        `restack` maps patch ids to their new live bytes. It must name every patch of which some edits
        stay active and others do not. A patch with no active edit has no live bytes; a patch with all
        edits active gets its original bytes; neither needs to be named. Raises WrongState, NoSuchEdit.
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
        """Record that reverted, replaced or rejected edits are active again, at their old position.

        `restack` as in `record_reverted`. Raises WrongState, NoSuchEdit.
        """
        new = NewEvent(
            kind="reapplied",
            edit_ids=edit_ids,
            reason=reason,
            weights_hash=weights_hash,
            state_hash=state_hash,
        )
        allowed = ("reverted", "replaced", "rejected")
        self._change(new, allowed, who, restack or {}, "reapply", measurements or {}, drift)

    def record_measurements(
        self,
        measurements: Measurements,
        occasion: str,
        drift: Mapping[str, Any] | None = None,
        who: Who = NOBODY,
        *,
        model_id: int | None = None,
    ) -> None:
        """Record new measurements of edits (by id) and the drift of the model.

        `model_id` is required if no edit is named. Raises NoSuchEdit.
        """
        edit_ids = list(measurements)
        with self._write() as db:
            edits = edits_of(db, edit_ids)
            model_id = edits[0]["model_id"] if edits else model_id
            if drift is not None and model_id is None:
                raise LedgerError("drift was given without an edit or a model_id; give model_id")
            payload = measurement_digests(occasion, measurements, drift)
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
        weights_hash: str | None = None,
        state_hash: str | None = None,
    ) -> int:
        """Record an event of another kind; returns its number. Raises NoSuchEdit.

        With `weights_hash` and `state_hash` it says what the live model is from now on.
        """
        if kind in _RESERVED:
            raise LedgerError(f"events of kind {kind!r} are recorded by their own method; use that")
        new = NewEvent(
            kind=kind,
            payload=payload,
            model_id=model_id,
            edit_ids=edit_ids,
            reason=reason,
            weights_hash=weights_hash,
            state_hash=state_hash,
        )
        with self._write() as db:
            edits_of(db, edit_ids)
            return int(append_event(db, new, who, now())["seq"])

    def _add(
        self,
        patches: Sequence[NewPatch],
        attempt: PatchesOfCall,
        replaced: Sequence[str],
        restack: Restack,
        approval: Approval | None = None,
    ) -> list[RecordedPatch]:
        if not patches:
            raise LedgerError("no patch was given to record")
        for patch in patches:
            check_patch(patch)
        with self._new_files() as put:
            blobs = [put(patch.blob, self._describe(patch, attempt)) for patch in patches]
            live = _put_all(put, restack)
            with self._write() as db:
                first = add_patch(db, attempt, patches[0], blobs[0], replaced, live)
                others = zip(patches[1:], blobs[1:], strict=True)
                recorded = [first, *(add_patch(db, attempt, patch, blob) for patch, blob in others)]
                if approval is not None:
                    ids = [edit_id for each in recorded for edit_id in each.edit_ids]
                    approve(db, approval, attempt.who, attempt.at, ids)
                return recorded

    def _describe(self, patch: NewPatch, attempt: PatchesOfCall) -> Json:
        """What is written beside the file of a patch: enough to import it again without this ledger."""
        model = self._row("SELECT name, architecture, base_hash FROM models WHERE id = ?", (patch.model_id,))
        return {
            "model": None if model is None else dict(model),
            "method": patch.method,
            "kind": patch.kind,
            "params": patch.params,
            "requests": list(patch.requests),
            "reason": patch.reason,
            "source": patch.source,
            "environment": patch.environment,
            "failed": attempt.failed,
        }

    def _change(
        self,
        new: NewEvent,
        allowed: Sequence[str],
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
                check_states(edits, allowed, new.kind)
                model_id = edits[0]["model_id"]
                touched = set_status(db, edits, CHANGING[new.kind], at, {})
                payload = {
                    "live": restack_patches(db, model_id, touched, live),
                    **measurement_digests(occasion, measurements, drift),
                }
                event = append_event(db, replace(new, payload=payload, model_id=model_id), who, at)
                insert_measurements(db, event, measurements)


def _put_all(put: Put, restack: Restack) -> dict[int, str | None]:
    return {patch_id: None if data is None else put(data) for patch_id, data in restack.items()}
