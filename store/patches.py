"""Adding new patches: the checks, the event, and the rows that follow from it.

Each function works inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from store.canonical import fact_key
from store.chain import NewEvent, append_event
from store.changes import (
    check_states,
    edits_of,
    insert,
    insert_measurements,
    measurement_digests,
    next_number,
    restack_patches,
    set_status,
)
from store.errors import LedgerError, WrongState
from store.history import edit_rows, patch_row
from store.records import Json, NewPatch, RecordedPatch, Who


@dataclass(frozen=True)
class PatchesOfCall:
    """What the patches of one call share: who made the call, when, and whether it was accepted."""

    who: Who
    at: str
    failed: Sequence[str] | None = None  # the bounds that were broken; None: the patches are applied


def check_patch(patch: NewPatch) -> None:
    """Raise LedgerError if a patch has no requests, or requests or measurements of the wrong form."""
    if not patch.requests:
        raise LedgerError("a patch without requests cannot be recorded")
    for index, request in enumerate(patch.requests):
        missing = [name for name in ("subject", "prompt", "target") if not isinstance(request.get(name), str)]
        if missing:
            raise LedgerError(
                f"requests[{index}] has no text in {', '.join(missing)}; subject, prompt and target are required"
            )
        for name in ("previous", "reason", "source"):
            if not isinstance(request.get(name), str | None):
                raise LedgerError(
                    f"requests[{index}] has {request[name]!r} as {name}; it must be a text or left out"
                )
    if patch.measurements and len(patch.measurements) != len(patch.requests):
        raise LedgerError(
            f"{len(patch.measurements)} measurements for {len(patch.requests)} requests; give one each"
        )


def add_patch(
    db: Database,
    attempt: PatchesOfCall,
    patch: NewPatch,
    source_blob: str,
    replaced: Sequence[str] = (),
    live: Mapping[int, str | None] | None = None,
) -> RecordedPatch:
    """Record one patch, the active edits it replaces, and the new live files (`live`) of earlier patches."""
    first = next_number(db, "edits", "seq")
    ids = [f"e{first + row}" for row in range(len(patch.requests))]
    measurements = dict(zip(ids, patch.measurements, strict=True)) if patch.measurements else {}
    old = edits_of(db, replaced)
    by = _replaced_by(old, patch, ids)
    touched = set_status(db, old, "replaced", attempt.at, by)
    payload = {
        "patch": _describe_patch(db, patch, source_blob),
        "edits": _describe_edits(patch, ids),
        "live": restack_patches(db, patch.model_id, touched, live or {}),
        **measurement_digests("apply", measurements, patch.drift),
        **({} if attempt.failed is None else {"failed": list(attempt.failed)}),
    }
    event = append_event(db, _new_event(attempt, patch, ids, payload), attempt.who, attempt.at)
    row = patch_row(event)
    insert(db, "patches", row)
    for edit_row in edit_rows(event):
        insert(db, "edits", edit_row)
    insert_measurements(db, event, measurements)
    if old:
        retired = NewEvent(
            kind="replaced",
            payload={"by": by},
            model_id=patch.model_id,
            edit_ids=replaced,
            reason=_reason(patch),
        )
        append_event(db, retired, attempt.who, attempt.at)
    return RecordedPatch(row["id"], row["position"], tuple(ids))


def _new_event(attempt: PatchesOfCall, patch: NewPatch, ids: Sequence[str], payload: Json) -> NewEvent:
    applied = attempt.failed is None
    return NewEvent(
        kind="applied" if applied else "rejected",
        payload=payload,
        model_id=patch.model_id,
        edit_ids=ids,
        reason=_reason(patch),
        weights_hash=patch.weights_hash_after if applied else None,
        state_hash=patch.state_hash if applied else None,
    )


def _reason(patch: NewPatch) -> str | None:
    """The reason of an event: that of the call or, if it gives none, the one that all of its edits share."""
    own = {request.get("reason") for request in patch.requests}
    return patch.reason or (own.pop() if len(own) == 1 else None)


def _describe_patch(db: Database, patch: NewPatch, source_blob: str) -> Json:
    model = db.execute("SELECT base_hash FROM models WHERE id = ?", [patch.model_id]).fetchone()
    if model is None:
        raise LedgerError(f"no model has the id {patch.model_id}; register it with model() first")
    last = db.execute(
        "SELECT max(position) AS p FROM patches WHERE model_id = ?", [patch.model_id]
    ).fetchone()["p"]
    return {
        "id": next_number(db, "patches", "id"),
        "position": 1 if last is None else last + 1,
        "method": patch.method,
        "kind": patch.kind,
        "params": patch.params,
        "source_blob": source_blob,
        "seconds": float(patch.seconds),
        "environment": patch.environment,
        "base_hash": model["base_hash"],
        "weights_hash_before": patch.weights_hash_before,
        "weights_hash_after": patch.weights_hash_after,
        "state_hash": patch.state_hash,
    }


def _describe_edits(patch: NewPatch, ids: Sequence[str]) -> list[Json]:
    return [
        {
            "id": edit_id,
            "row": row,
            "request": request,
            "reason": request.get("reason") or patch.reason,
            "source": request.get("source") or patch.source,
        }
        for row, (edit_id, request) in enumerate(zip(ids, patch.requests, strict=True))
    ]


def _replaced_by(old: Sequence[Any], patch: NewPatch, ids: Sequence[str]) -> dict[str, str]:
    """For each replaced edit, the new edit of the same fact, or else the first new edit."""
    check_states(old, ("active",), "replaced")
    if any(edit["model_id"] != patch.model_id for edit in old):
        raise WrongState("the edits to be replaced belong to another model")
    keys = [fact_key(r["subject"], r["prompt"]) for r in patch.requests]
    new = dict(reversed(list(zip(keys, ids, strict=True))))
    return {edit["id"]: new.get(edit["fact_key"], ids[0]) for edit in old}
