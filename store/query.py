"""Running SQL that a client wrote, made safe by SQLite itself.

The query gets its own connection, opened with `mode=ro`. An authorizer allows only reading, a
progress handler stops what takes too long, sizes are limited, and the driver allows one statement.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from store.connection import file_uri, forgiving_text
from store.errors import QueryError

MAX_ROWS = 1_000
_MAX_CELL = 4_000  # characters of one value
_MAX_CHARS = 200_000  # characters of one answer
_MAX_SQL = 20_000
_STEPS = 1_000  # virtual machine steps between two checks of the time

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_DENIED_FUNCTIONS = {"load_extension", "writefile", "readfile", "edit", "fts3_tokenizer", "sqlite_log"}
# FTS5 itself uses data_version; the others only describe tables
_PRAGMAS = {
    "data_version",
    "table_info",
    "table_xinfo",
    "table_list",
    "index_list",
    "index_info",
    "foreign_key_list",
}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 32_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 2 * _MAX_SQL,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}


class QueryResult(NamedTuple):
    """The result of a query: column names, rows of JSON values, and whether rows were left out."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


def run_query(
    path: Path,
    sql: str,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    limit: int = 100,
    seconds: float = 5.0,
) -> QueryResult:
    """Run one SELECT on the database file. Raises QueryError with what is wrong."""
    if not 1 <= limit <= MAX_ROWS:
        raise QueryError(f"limit {limit} is out of range; it goes from 1 to {MAX_ROWS:,}")
    if not sql.strip():
        raise QueryError("sql is empty; write one SELECT statement")
    if len(sql) > _MAX_SQL:
        raise QueryError(f"sql has {len(sql):,} characters; the most is {_MAX_SQL:,}")
    conn = None
    try:
        conn = _connect(path, seconds)
        cursor = conn.execute(sql, params if isinstance(params, Mapping) else tuple(params or ()))
        fetched = cursor.fetchmany(limit + 1)
        columns = [column[0] for column in cursor.description or ()]
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, TypeError) as error:
        raise QueryError(_explain(conn, sql, error, seconds)) from error
    finally:
        if conn is not None:
            conn.close()
    if not columns:
        raise QueryError("the statement returns no rows; only one SELECT statement can be run")
    return _result(columns, fetched, limit)


def _connect(path: Path, seconds: float) -> sqlite3.Connection:
    conn = sqlite3.connect(file_uri(path, "ro"), uri=True, isolation_level=None, timeout=seconds)
    try:
        conn.text_factory = forgiving_text
        conn.execute("PRAGMA query_only = ON")
        for category, value in _LIMITS.items():
            conn.setlimit(category, value)
        conn.set_authorizer(_authorize)
        end = time.monotonic() + seconds
        conn.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
    except BaseException:
        conn.close()
        raise
    return conn


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Called by SQLite for each part of a statement before it is compiled: allow or deny it."""
    if action in _ALLOWED:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_DENY if (second or "").lower() in _DENIED_FUNCTIONS else sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
        # needed to set up a virtual table (FTS5, json_each); SQLite itself refuses a real update
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _explain(conn: sqlite3.Connection | None, sql: str, error: Exception, seconds: float) -> str:
    """The error message, with what the author of the SQL needs to correct it."""
    text = str(error)
    if "interrupted" in text:
        return f"the query took longer than {seconds:g} s and was stopped; narrow it down or add a LIMIT"
    if any(sign in text for sign in ("authoriz", "prohibited", "readonly")):
        return f"{text}: only reading is allowed, with one SELECT; to change the ledger, use the tools for it"
    if "one statement" in text:
        return "sql holds more than one statement; send one SELECT at a time"
    if conn is None:
        return f"{text} (the ledger could not be opened for reading)"
    if "no such table" in text:
        return f"{text}; the tables are {', '.join(_tables(conn))}"
    if "no such column" in text or "ambiguous column" in text:
        columns = (
            f"{name}({', '.join(_columns(conn, name))})" for name in _tables(conn) if _mentions(sql, name)
        )
        return f"{text}; the columns are {'; '.join(columns)}"
    return f"{text}; sql was {sql[:200]!r}"


def _tables(conn: sqlite3.Connection) -> list[str]:
    conn.set_progress_handler(None, 0)
    rows = conn.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")
    return [name for (name,) in rows if not name.startswith(("edits_fts_", "sqlite_", "_sqlite"))]


def _columns(conn: sqlite3.Connection, table: str) -> list[str]:
    return [name for (name,) in conn.execute("SELECT name FROM pragma_table_info(?)", [table])]


def _mentions(sql: str, table: str) -> bool:
    return re.search(rf"\b{table}\b", sql, re.IGNORECASE) is not None


def _result(columns: list[str], fetched: list[tuple[Any, ...]], limit: int) -> QueryResult:
    rows: list[list[Any]] = []
    chars = 0
    for row in fetched[:limit]:
        cells = [_cell(value) for value in row]
        chars += sum(len(cell) for cell in cells if isinstance(cell, str))
        if rows and chars > _MAX_CHARS:
            return QueryResult(columns, rows, True)
        rows.append(cells)
    return QueryResult(columns, rows, len(fetched) > limit)


def _cell(value: Any) -> Any:
    """A value that JSON can hold, cut if it is long."""
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, str) and len(value) > _MAX_CELL:
        return f"{value[:_MAX_CELL]}... (cut; {len(value):,} characters)"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value


def describe_schema(path: Path) -> str:
    """The tables as SQL with their comments, for the author of a query."""
    sql = "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND sql IS NOT NULL ORDER BY rowid"
    try:
        conn = _connect(path, 5.0)
        try:
            statements = [text for (text,) in conn.execute(sql)]
        finally:
            conn.close()
    except sqlite3.Error as error:
        raise QueryError(f"the schema cannot be read: {error}") from error
    ours = [
        text
        for text in statements
        if not re.match(r"CREATE TABLE ['\"\[]?(edits_fts_|sqlite_|_sqlite)", text)
    ]
    return _HEAD + "".join(f"{text};\n\n" for text in ours).rstrip() + "\n"


_HEAD = """\
-- The ledger, SQLite. Read-only: one SELECT at a time; JSON columns with json_extract(column, '$.name').
-- Active corrections, newest first:
--   SELECT id, subject, prompt, target, created FROM edits WHERE status = 'active' ORDER BY seq DESC
-- How an edit held over time:
--   SELECT at, occasion, reliability, generality, locality FROM measurements WHERE edit_id = 'e1' ORDER BY id
-- What happened, and who asked:
--   SELECT seq, at, kind, edit_ids, client, reason FROM events ORDER BY seq DESC

"""
