"""Checks the ledger: the database, the chain of events, the rows that follow from them, the files."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from store.blobs import Blobs
from store.canonical import digest, finite_or_none, parse_json
from store.chain import read_chain
from store.errors import BlobError
from store.fact_sets import check_fact_sets
from store.history import History, differences
from store.proposals import check_proposals
from store.records import RATES, Problem
from store.schema_check import check_schema, check_search
from store.vectors import check_vectors

Rows = Callable[[str], list[sqlite3.Row]]


def verify(rows: Rows, blobs: Blobs, database: str, uri: str, files: bool) -> list[Problem]:
    """Every problem. `rows` runs SQL, `uri` opens the database once more.

    With `files`, patch files are read and hashed too.
    """
    problems: list[Problem] = []
    history = History(())
    present = blobs.names() - blobs.announced() if files else set()  # before the events: see _check_unnamed
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
        problems += _check_named(rows, history)
        problems += check_search(uri, database) if uri else []
        problems += check_vectors([dict(row) for row in rows("SELECT * FROM vectors")], events)
        sets, facts = ([dict(row) for row in rows(f"SELECT * FROM {t}")] for t in ("fact_sets", "set_facts"))
        problems += check_fact_sets(sets, facts, events)
        problems += check_proposals([dict(row) for row in rows("SELECT * FROM proposals")], events)
    except sqlite3.Error as error:
        problems.append(Problem("sqlite", database, str(error)))
    if files:
        problems += _check_blobs(rows, blobs, history)
        problems += _check_unnamed(blobs, present - history.blobs)
    return problems


def _check_sqlite(rows: Rows, database: str) -> Iterator[Problem]:
    for row in rows("PRAGMA integrity_check"):
        if row[0] != "ok":
            yield Problem("sqlite", database, row[0])
    for row in rows("PRAGMA foreign_key_check"):
        yield Problem("sqlite", f"{row[0]} row {row[1]}", f"points to a row of {row[2]} that does not exist")
    yield from check_schema(rows, database)


def _check_rows(rows: Rows, history: History) -> Iterator[Problem]:
    for table, expected in (
        ("models", history.models),
        ("edits", history.edits),
        ("patches", history.patches),
    ):
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
    if table != "patches":
        return str(key) if table == "edits" else f"model {key}"
    ids = [edit["id"] for edit in history.edits.values() if edit["patch_id"] == key]
    return f"patch {key} ({', '.join(ids[:5])}{' ...' if len(ids) > 5 else ''})"


def _check_measured(rows: Rows, history: History) -> Iterator[Problem]:
    missing = dict(history.measured)
    yield from _check_order(rows, "measurements")
    yield from _check_order(rows, "drift")
    for row in rows("SELECT * FROM measurements"):
        recorded = missing.pop((row["event_seq"], row["edit_id"]), None)
        values = parse_json(row["measured"], {})
        rates = all(row[rate] == finite_or_none(values.get(rate)) for rate in RATES)
        found = {"at": row["at"], "occasion": row["occasion"], "digest": digest(row["measured"])}
        if recorded != found or not rates:
            yield Problem("row", row["edit_id"], f"measurement {row['id']} ({row['occasion']}) was altered")
    for seq, edit_id in missing:
        yield Problem("row", edit_id, f"its measurement of event {seq} is missing")
    drift = dict(history.drift)
    for row in rows("SELECT * FROM drift"):
        recorded = drift.pop(row["event_seq"], None)
        if recorded is None or differences(recorded, dict(row)):
            yield Problem("row", f"drift {row['id']}", f"({row['occasion']}) was altered")
    for seq in drift:
        yield Problem("row", f"event {seq}", "its drift is missing")


def _check_order(rows: Rows, table: str) -> Iterator[Problem]:
    """Rows are numbered in the order of their events: the last one of an edit is what it is shown with."""
    before = 0
    for row in rows(f"SELECT id, event_seq FROM {table} ORDER BY id"):
        if row["event_seq"] < before:
            yield Problem("row", f"{table} {row['id']}", "its number is not in the order of the events")
        before = row["event_seq"]


def _check_named(rows: Rows, history: History) -> Iterator[Problem]:
    present = {(row["edit_id"], row["seq"]) for row in rows("SELECT edit_id, seq FROM event_edits")}
    for edit_id, seq in sorted(history.named - present):
        yield Problem("row", f"event {seq}", f"its row of event_edits for {edit_id} is missing")
    for edit_id, seq in sorted(present - history.named):
        yield Problem("row", f"event {seq}", f"event_edits says it is about {edit_id}, which it is not")


def _check_blobs(rows: Rows, blobs: Blobs, history: History) -> Iterator[Problem]:
    needed: dict[str, list[str]] = {sha: [] for sha in history.blobs - history.removed}
    try:
        named = rows(
            "SELECT p.id, p.source_blob, p.blob, group_concat(e.id, ', ') AS ids FROM patches p"
            " LEFT JOIN edits e ON e.patch_id = p.id GROUP BY p.id"
        )
    except sqlite3.Error:  # reported already; the files that the events name are still checked
        named = []
    for row in named:
        files = {row["source_blob"], row["blob"]} - {None}
        for sha in files if row["blob"] is not None else files - history.removed:
            needed.setdefault(str(sha), []).append(row["ids"] or f"patch {row['id']}")
    for sha, edits in sorted(needed.items()):
        try:
            blobs.verify(sha)
        except BlobError as error:
            who = ", ".join(edits) or "an earlier state"
            yield Problem("blob", f"{sha}.safetensors", f"{error} (needed by {who})")


def _check_unnamed(blobs: Blobs, unnamed: set[str]) -> Iterator[Problem]:
    """Patch files that no event names. A change announces its files before it stores them, so these were recorded.

    The files were listed before the events were read: another process may record one in between.
    """
    unnamed -= blobs.known_unnamed()
    if unnamed:
        first = sorted(unnamed)[0]
        yield Problem(
            "blob",
            str(blobs.folder),
            f"{len(unnamed)} patch files are named by no event, such as {first[:12]}...: the ledger has lost what "
            "recorded them. Restore a backup (errata-mcp restore), or see what they hold (errata-mcp recover)",
        )
