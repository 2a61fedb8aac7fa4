"""The steps of a change: status, live files, measurements. Each runs in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlite_utils import Database

from store.canonical import canonical_json, digest, finite_or_none, storable_text
from store.errors import NoSuchEdit, WrongState
from store.history import drift_row
from store.records import RATES, Json

Measurements = Mapping[str, Mapping[str, Any]]


def edits_of(db: Database, edit_ids: Sequence[str]) -> list[Any]:
    """The rows of edits, in the order named. Raises NoSuchEdit, and WrongState if one is named twice."""
    if len(set(edit_ids)) != len(edit_ids):
        raise WrongState(f"an edit is named twice: {', '.join(edit_ids)}; name each once")
    rows = []
    for edit_id in edit_ids:
        row = db.execute("SELECT * FROM edits WHERE id = ?", [storable_text(edit_id)]).fetchone()
        if row is None:
            raise NoSuchEdit(f"no edit has the id {edit_id[:80]!r}")
        rows.append(row)
    return rows


def check_states(edits: Sequence[Any], allowed: Sequence[str], kind: str) -> None:
    """Raise WrongState unless all edits have an allowed status and belong to one model."""
    wrong = [f"{edit['id']} is {edit['status']}" for edit in edits if edit["status"] not in allowed]
    if wrong:
        raise WrongState(f"{', '.join(wrong)}; only edits that are {' or '.join(allowed)} can be {kind}")
    if len({edit["model_id"] for edit in edits}) > 1:
        raise WrongState("the edits belong to several models; change those of one model at a time")


def set_status(db: Database, edits: Iterable[Any], status: str, at: str, by: Mapping[str, str]) -> set[int]:
    """Change the status of edits; returns the ids of their patches. `by`: edit id to the id that replaces it."""
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
    """Set the live file of every patch that changed; returns patch id to SHA-256 (None: not live).

    `touched` are the patches whose edits changed their status, `given` the new live files. A patch
    has a live file exactly if one of its edits is active. Raises WrongState.
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
            raise WrongState(f"restack names patch {patch_id}, which does not belong to model {model_id}")
        if patch_id in given:
            blob = given[patch_id]
        elif 0 < patch["active"] < patch["edits"]:
            raise WrongState(
                f"some edits of patch {patch_id} stay active and others do not; restack must give its recomputed bytes"
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


def measurement_digests(occasion: str, measurements: Measurements, drift: Mapping[str, Any] | None) -> Json:
    """The part of an event's payload that covers measurements: a digest for each edit, and the drift."""
    digests = {edit_id: digest(canonical_json(values)) for edit_id, values in measurements.items()}
    return {"occasion": occasion, "measurements": digests, "drift": drift}


def measurement_row(event: Mapping[str, Any], edit_id: str, values: Mapping[str, Any]) -> Json:
    """The row of `measurements` for one edit."""
    return {
        "edit_id": edit_id,
        "event_seq": event["seq"],
        "at": event["at"],
        "occasion": event["payload"]["occasion"],
        **{rate: finite_or_none(values.get(rate)) for rate in RATES},
        "measured": canonical_json(values),
    }


def insert_measurements(db: Database, event: Mapping[str, Any], measurements: Measurements) -> None:
    """Insert the rows of `measurements` and `drift` that belong to an event."""
    for edit_id, values in measurements.items():
        insert(db, "measurements", measurement_row(event, edit_id, values))
    drift = event["payload"]["drift"]
    if drift is None:
        return
    insert(db, "drift", drift_row(event, drift))


def insert(db: Database, table: str, row: Mapping[str, Any]) -> int:
    """Insert one row; returns its rowid."""
    names = ", ".join(f'"{name}"' for name in row)
    cursor = db.execute(
        f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(row))})", list(row.values())
    )
    return int(cursor.lastrowid or 0)


def next_number(db: Database, table: str, column: str) -> int:
    """The highest number in a column, plus one."""
    return int(db.execute(f"SELECT coalesce(max({column}), 0) + 1 AS n FROM {table}").fetchone()["n"])
