"""Everything that changes the ledger. Each method is one transaction with the event that tells of it.

Patch files are on the disk before the row that names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlite_utils import Database

from store.canonical import clean, fact_key, now
from store.chain import NewEvent, append_event, tidy
from store.changes import (
    Measurements,
    check_patch,
    check_states,
    describe_edits,
    describe_patch,
    insert,
    insert_measurements,
    next_number,
    restack_patches,
    set_status,
    vouch,
)
from store.connection import Connection
from store.errors import LedgerError, LedgerReadOnly, NoSuchEdit, WrongState
from store.history import CHANGING, RECORDING, edit_rows, patch_row
from store.records import NOBODY, Json, NewPatch, Who
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

    def record_applied(
        self,
        patch: NewPatch,
        who: Who = NOBODY,
        *,
        replaced: Sequence[str] = (),
        restack: Restack | None = None,
    ) -> list[str]:
        """Record an applied patch; returns the ids of its edits, in the order of its requests.

        `replaced` are active edits it retires; `restack` gives the new live bytes of other patches
        that changed because of it (see `record_reverted`). Raises WrongState or NoSuchEdit, with
        nothing recorded.
        """
        return self._record("applied", patch, who, {}, replaced, restack or {})

    def record_rejected(self, patch: NewPatch, failed: Sequence[str], who: Who = NOBODY) -> list[str]:
        """Record an attempt that broke the bounds named in `failed`; its patch and measurements are kept."""
        return self._record("rejected", patch, who, {"failed": list(failed)}, (), {})

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
            edits = _edits_of(db, edit_ids)
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
            _edits_of(db, edit_ids)
            return int(append_event(db, new, who, now())["seq"])

    def _put(self, data: bytes) -> str:
        if self.read_only:
            raise LedgerReadOnly(f"the ledger {self.path} is open read-only; nothing was recorded")
        try:
            return self.blobs.put(data)
        except OSError as error:
            raise LedgerError(
                f"{self.blobs.folder} cannot be written: {error}; nothing was recorded"
            ) from error

    def _put_all(self, restack: Restack) -> dict[int, str | None]:
        return {patch_id: None if data is None else self._put(data) for patch_id, data in restack.items()}

    def _record(
        self, kind: str, patch: NewPatch, who: Who, extra: Json, replaced: Sequence[str], restack: Restack
    ) -> list[str]:
        check_patch(patch)
        source_blob, live = self._put(patch.blob), self._put_all(restack)
        with self._write() as db:
            at = now()
            first = next_number(db, "edits", "seq")
            ids = [f"e{first + row}" for row in range(len(patch.requests))]
            measurements = dict(zip(ids, patch.measurements, strict=True)) if patch.measurements else {}
            old = _edits_of(db, replaced)
            by = _replaced_by(old, patch, ids)
            touched = set_status(db, old, "replaced", at, by)
            payload = {
                "patch": describe_patch(db, patch, source_blob),
                "edits": describe_edits(patch, ids),
                "live": restack_patches(db, patch.model_id, touched, live),
                **vouch("apply", measurements, patch.drift),
                **extra,
            }
            about = NewEvent(
                kind=kind, payload=payload, model_id=patch.model_id, edit_ids=ids, reason=patch.reason
            )
            if kind == "applied":
                about = replace(about, weights_hash=patch.weights_hash_after, state_hash=patch.state_hash)
            event = append_event(db, about, who, at)
            insert(db, "patches", patch_row(event))
            for row in edit_rows(event):
                insert(db, "edits", row)
            insert_measurements(db, event, measurements)
            if old:
                retired = NewEvent(
                    kind="replaced", payload={"by": by}, model_id=patch.model_id, edit_ids=replaced
                )
                append_event(db, replace(retired, reason=patch.reason), who, at)
        return ids

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
        live = self._put_all(restack)
        with self._write() as db:
            at = now()
            edits = _edits_of(db, new.edit_ids)
            check_states(edits, came_from, new.kind)
            model_id = edits[0]["model_id"]
            touched = set_status(db, edits, CHANGING[new.kind], at, {})
            payload = {
                "live": restack_patches(db, model_id, touched, live),
                **vouch(occasion, measurements, drift),
            }
            event = append_event(db, replace(new, payload=payload, model_id=model_id), who, at)
            insert_measurements(db, event, measurements)


def _replaced_by(old: Sequence[Any], patch: NewPatch, ids: Sequence[str]) -> dict[str, str]:
    """Which new edit retires which old one: the first that asks the same, else the first of all."""
    check_states(old, ("active",), "replaced")
    if any(edit["model_id"] != patch.model_id for edit in old):
        raise WrongState("the edits to be replaced belong to another model")
    keys = [fact_key(r["subject"], r["prompt"]) for r in patch.requests]
    new = dict(reversed(list(zip(keys, ids, strict=True))))
    return {edit["id"]: new.get(edit["fact_key"], ids[0]) for edit in old}


def _edits_of(db: Database, edit_ids: Sequence[str]) -> list[Any]:
    if len(set(edit_ids)) != len(edit_ids):
        raise WrongState(f"an edit is named twice: {', '.join(edit_ids)}; name each once")
    found = []
    for edit_id in edit_ids:
        row = db.execute("SELECT * FROM edits WHERE id = ?", [clean(edit_id)]).fetchone()
        if row is None:
            raise NoSuchEdit(f"no edit has the id {edit_id[:80]!r}")
        found.append(row)
    return found
