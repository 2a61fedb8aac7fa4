"""Checks that the database has this version's schema, and that the search index agrees with the edits."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from functools import cache

from sqlite_utils import Database

from store.migrations import migrate
from store.records import Problem
from store.tables import GUARDS

Rows = Callable[[str], list[sqlite3.Row]]
_SCHEMA = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
_FTS = ("subject", "prompt", "target", "reason")


def check_schema(rows: Rows, database: str) -> Iterator[Problem]:
    """Every table, index, trigger and view that is missing, altered or not of this program."""
    present = {(row[0], row[1]): row[2] for row in rows(_SCHEMA) if _is_ours(row[0], row[1])}
    expected = _expected()
    for kind, name in sorted(expected.keys() - present.keys()):
        guard = ", which guards the history," if name in GUARDS else ""
        yield Problem("sqlite", database, f"the {kind} {name}{guard} was removed")
    for kind, name in sorted(present.keys() - expected.keys()):
        yield Problem("sqlite", database, f"the {kind} {name} was added by another program")
    for kind, name in sorted(present.keys() & expected.keys()):
        if present[kind, name] != expected[kind, name]:
            yield Problem("sqlite", database, f"the {kind} {name} was altered")


def _is_ours(kind: str, name: str) -> bool:
    """False for tables that SQLite, its search index and sqlite-utils make for themselves."""
    kept = ("sqlite_", "_sqlite_", "edits_fts_") if kind == "table" else ("sqlite_", "_sqlite_")
    return not name.startswith(kept)


@cache
def _expected() -> dict[tuple[str, str], str]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        conn.row_factory = sqlite3.Row
        migrate(Database(conn, execute_plugins=False), True)
        return {(row[0], row[1]): row[2] for row in conn.execute(_SCHEMA) if _is_ours(row[0], row[1])}


def check_search(uri: str, database: str) -> Iterator[Problem]:
    """Compare the words of the search index with those of the edits, through a connection of its own."""
    columns = ", ".join(_FTS)
    with contextlib.closing(sqlite3.connect("file::memory:", uri=True, isolation_level=None)) as conn:
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.execute("ATTACH ? AS ledger", [uri])
        conn.execute(
            f"CREATE VIRTUAL TABLE expected USING fts5({columns}, tokenize='unicode61 remove_diacritics 2')"
        )
        conn.execute(f"INSERT INTO expected (rowid, {columns}) SELECT seq, {columns} FROM ledger.edits")
        conn.execute("CREATE VIRTUAL TABLE temp.found USING fts5vocab(ledger, edits_fts, instance)")
        conn.execute("CREATE VIRTUAL TABLE temp.wanted USING fts5vocab(main, expected, instance)")
        if _digest(conn, "found") != _digest(conn, "wanted"):
            yield Problem("sqlite", database, "the search index edits_fts does not agree with the edits")


def _digest(conn: sqlite3.Connection, table: str) -> str:
    digest = hashlib.sha256()
    for row in conn.execute(f"SELECT term, doc, col, offset FROM temp.{table} ORDER BY 1, 2, 3, 4"):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()
