"""The steps recording is made of; each works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlite_utils import Database

from store.canonical import canonical, digest, number
from store.errors import LedgerError, WrongState
from store.records import RATES, Json, NewPatch

Measurements = Mapping[str, Mapping[str, Any]]


def check_patch(patch: NewPatch) -> None:
    if not patch.requests:
        raise LedgerError("a patch without requests cannot be recorded")
    for index, request in enumerate(patch.requests):
        missing = [name for name in ("subject", "prompt", "target") if not isinstance(request.get(name), str)]
        if missing:
            raise LedgerError(
                f"requests[{index}] has no text in {', '.join(missing)}; an edit needs all three"
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


def check_states(edits: Sequence[Any], allowed: Sequence[str], kind: str) -> None:
    wrong = [f"{edit['id']} is {edit['status']}" for edit in edits if edit["status"] not in allowed]
    if wrong:
        raise WrongState(f"{', '.join(wrong)}; only edits that are {' or '.join(allowed)} can be {kind}")
    if len({edit["model_id"] for edit in edits}) > 1:
        raise WrongState("the edits belong to several models; change those of one model at a time")


def describe_patch(db: Database, patch: NewPatch, source_blob: str) -> Json:
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


def describe_edits(patch: NewPatch, ids: Sequence[str]) -> list[Json]:
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


def set_status(db: Database, edits: Iterable[Any], status: str, at: str, by: Mapping[str, str]) -> set[int]:
    """Change the status of edits; returns the patches they belong to."""
    touched = set()
    for edit in edits:
        replaced_by = edit["replaced_by"] if status == "reverted" else by.get(edit["id"])
        db.execute(
            "UPDATE edits SET status = ?, changed = ?, replaced_by = ? WHERE id = ?",
            [status, at, replaced_by, edit["id"]],
        )
        touched.add(int(edit["patch_id"]))
    return touched


def restack_patches(
    db: Database, model_id: int, touched: set[int], given: Mapping[int, str | None]
) -> dict[str, str | None]:
    """Set what is live of every patch concerned, and return it.

    A patch is live exactly when an edit of it is active.
    """
    live: dict[str, str | None] = {}
    for patch_id in sorted(touched | set(given)):
        patch = db.execute(
            "SELECT source_blob, (SELECT count(*) FROM edits WHERE patch_id = p.id) AS edits,"
            " (SELECT count(*) FROM edits WHERE patch_id = p.id AND status = 'active') AS active"
            " FROM patches p WHERE id = ? AND model_id = ?",
            [patch_id, model_id],
        ).fetchone()
        if patch is None:
            raise WrongState(f"restack names patch {patch_id}, which is none of model {model_id}")
        if patch_id in given:
            blob = given[patch_id]
        elif 0 < patch["active"] < patch["edits"]:
            raise WrongState(
                f"patch {patch_id} keeps some edits and not others; restack must give its recomputed bytes"
            )
        else:
            blob = patch["source_blob"] if patch["active"] else None
        if (blob is None) != (patch["active"] == 0):
            raise WrongState(
                f"patch {patch_id} has {patch['active']} active edits; restack gives it the wrong bytes"
            )
        db.execute("UPDATE patches SET blob = ? WHERE id = ?", [blob, patch_id])
        live[str(patch_id)] = blob
    return live


def vouch(occasion: str, measurements: Measurements, drift: Mapping[str, Any] | None) -> Json:
    """The part of an event that vouches for what was measured."""
    digests = {edit_id: digest(canonical(values)) for edit_id, values in measurements.items()}
    return {"occasion": occasion, "measurements": digests, "drift": drift}


def measurement_row(event: Mapping[str, Any], edit_id: str, values: Mapping[str, Any]) -> Json:
    """The row of `measurements` for one edit."""
    return {
        "edit_id": edit_id,
        "event_seq": event["seq"],
        "at": event["at"],
        "occasion": event["payload"]["occasion"],
        **{rate: number(values.get(rate)) for rate in RATES},
        "measured": canonical(values),
    }


def insert_measurements(db: Database, event: Mapping[str, Any], measurements: Measurements) -> None:
    for edit_id, values in measurements.items():
        insert(db, "measurements", measurement_row(event, edit_id, values))
    drift = event["payload"]["drift"]
    if drift is None:
        return
    columns = {name: number(drift.get(name)) for name in ("kl", "perplexity_before", "perplexity_after")}
    shared = {"event_seq": event["seq"], "model_id": event["model_id"], "at": event["at"]}
    row = {**shared, "occasion": event["payload"]["occasion"], **columns, "measured": canonical(drift)}
    insert(db, "drift", row)


def insert(db: Database, table: str, row: Mapping[str, Any]) -> int:
    names = ", ".join(f'"{name}"' for name in row)
    cursor = db.execute(
        f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(row))})", list(row.values())
    )
    return int(cursor.lastrowid or 0)


def next_number(db: Database, table: str, column: str) -> int:
    return int(db.execute(f"SELECT coalesce(max({column}), 0) + 1 AS n FROM {table}").fetchone()["n"])
