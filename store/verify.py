"""Checking the ledger: the database, the chain of events, the rows that follow from them, the files."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from store.blobs import Blobs
from store.canonical import digest, finite_or_none, parse_json
from store.chain import read_chain
from store.errors import BlobError
from store.history import History, differences
from store.migrations import GUARDS
from store.records import RATES, Problem
from store.vectors import check_vectors

Rows = Callable[[str], list[sqlite3.Row]]


def verify(rows: Rows, blobs: Blobs, database: str, files: bool) -> list[Problem]:
    """Every problem. `rows` runs SQL; with `files`, patch files are read and hashed too."""
    problems: list[Problem] = []
    history = History(())
    try:
        problems += _check_sqlite(rows, database)
    except sqlite3.Error as error:
        problems.append(Problem("sqlite", database, str(error)))
    try:
        last = [row["seq"] for row in rows("SELECT seq FROM sqlite_sequence WHERE name = 'events'")]
        events, broken = read_chain(rows("SELECT * FROM events ORDER BY seq"), last[0] if last else None)
        history = History(events)
        problems += broken + history.problems
        problems += _check_rows(rows, history)
        problems += _check_measured(rows, history)
        problems += check_vectors([dict(row) for row in rows("SELECT * FROM vectors")], events)
    except sqlite3.Error as error:
        problems.append(Problem("sqlite", database, str(error)))
    if files:
        problems += _check_blobs(rows, blobs, history)
    return problems


def _check_sqlite(rows: Rows, database: str) -> Iterator[Problem]:
    for row in rows("PRAGMA integrity_check"):
        if row[0] != "ok":
            yield Problem("sqlite", database, row[0])
    for row in rows("PRAGMA foreign_key_check"):
        yield Problem("sqlite", f"{row[0]} row {row[1]}", f"points to a row of {row[2]} that does not exist")
    present = {row["name"] for row in rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
    for name in sorted(GUARDS - present):
        yield Problem("sqlite", database, f"the trigger {name}, which guards the history, was removed")


def _check_rows(rows: Rows, history: History) -> Iterator[Problem]:
    for table, expected in (("edits", history.edits), ("patches", history.patches)):
        present: dict[Any, Mapping[str, Any]] = {
            row["id"]: dict(row) for row in rows(f"SELECT * FROM {table}")
        }
        for key in sorted(expected.keys() - present.keys(), key=str):
            yield Problem(
                "row", _name(table, key, history), f"is missing from {table}, but it is in the events"
            )
        for key, row in present.items():
            if key not in expected:
                yield Problem("row", _name(table, key, history), "is not in any event")
            elif different := differences(expected[key], row):
                yield Problem("row", _name(table, key, history), "was altered: " + "; ".join(different))

    for model in rows(
        "SELECT DISTINCT m.id, m.base_hash, p.base_hash AS made_on"
        " FROM patches p JOIN models m ON m.id = p.model_id WHERE p.base_hash <> m.base_hash"
    ):
        message = f"has base_hash {model['base_hash']!r}, but its patches were made on {model['made_on']!r}"
        yield Problem("row", f"model {model['id']}", message)


def _name(table: str, key: Any, history: History) -> str:
    if table == "edits":
        return str(key)
    ids = [edit["id"] for edit in history.edits.values() if edit["patch_id"] == key]
    return f"patch {key} ({', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''})"


def _check_measured(rows: Rows, history: History) -> Iterator[Problem]:
    missing = dict(history.measured)
    for row in rows("SELECT * FROM measurements"):
        recorded = missing.pop((row["event_seq"], row["edit_id"]), None)
        values = parse_json(row["measured"], {})
        rates = all(row[rate] == finite_or_none(values.get(rate)) for rate in RATES)
        if recorded != digest(row["measured"]) or not rates:
            yield Problem("row", row["edit_id"], f"measurement {row['id']} ({row['occasion']}) was altered")
    for seq, edit_id in missing:
        yield Problem("row", edit_id, f"its measurement of event {seq} is missing")
    drift = dict(history.drift)
    for row in rows("SELECT * FROM drift"):
        if drift.pop(row["event_seq"], None) != row["measured"]:
            yield Problem("row", f"drift {row['id']}", f"({row['occasion']}) was altered")
    for seq in drift:
        yield Problem("row", f"event {seq}", "its drift is missing")


def _check_blobs(rows: Rows, blobs: Blobs, history: History) -> Iterator[Problem]:
    needed: dict[str, list[str]] = {sha: [] for sha in history.blobs}
    try:
        named = rows(
            "SELECT p.id, p.source_blob, p.blob, group_concat(e.id, ', ') AS ids FROM patches p"
            " LEFT JOIN edits e ON e.patch_id = p.id GROUP BY p.id"
        )
    except sqlite3.Error:  # reported already; the files that the events name are still checked
        named = []
    for row in named:
        for sha in {row["source_blob"], row["blob"]} - {None}:
            needed.setdefault(str(sha), []).append(row["ids"] or f"patch {row['id']}")
    for sha, edits in sorted(needed.items()):
        try:
            blobs.verify(sha)
        except BlobError as error:
            who = ", ".join(edits) or "an earlier state"
            yield Problem("blob", f"{sha}.safetensors", f"{error} (needed by {who})")
