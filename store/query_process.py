"""The process that runs SQL which a client wrote. It has the standard library alone and reads one file.

A function of SQLite cannot be interrupted while it runs (`instr` over two long texts takes minutes). So the query
runs in a process of its own, which ends itself when the time is over, whatever SQLite is doing.
Requests come as lines of JSON on standard input, answers go as lines of JSON to standard output; the other
side is store/query.py.

SQLite itself keeps the query to reading: the file is opened read-only and an authorizer allows nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import sys
import threading
import time
from typing import Any

MAX_SQL = 20_000  # characters of the statement
MAX_CELL = 4_000  # characters of one value of the answer
MAX_ANSWER = 200_000  # characters of all values of the answer
MAX_COLUMNS = 256
MAX_VALUE = 32_000_000  # bytes of one value while the query runs
MAX_HEAP = 256 * 2**20  # bytes that SQLite may hold
MAX_MEMORY = 2**30  # bytes of address space of this process, where the system can limit it
TIME_IS_OVER = 75  # exit status
_GRACE = 0.3  # seconds that SQLite has to stop by itself
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
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 2 * MAX_SQL,
    sqlite3.SQLITE_LIMIT_COLUMN: MAX_COLUMNS,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, TypeError)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`columns`, `rows` and `truncated`, or `error`. Ends the process when the time is over."""
    seconds: float = request["seconds"]
    clock = threading.Timer(seconds + _GRACE, os._exit, [TIME_IS_OVER])
    clock.daemon = True
    clock.start()
    conn = None
    try:
        conn = connect(request["uri"], seconds)
        cursor = conn.execute(request["sql"], request["params"])
        columns = [str(_cell(column[0])) for column in cursor.description or ()]
        rows, truncated = _rows(cursor, request["limit"], sum(map(len, columns)))
        return {"columns": columns, "rows": rows, "truncated": truncated}
    except _FAILURES as error:
        if "interrupted" in str(error):
            os._exit(TIME_IS_OVER)
        return {"error": _explain(conn, request["sql"], error)}
    except MemoryError:
        return {"error": _too_much_memory()}
    finally:
        if conn is not None:
            conn.close()
        clock.cancel()


def _too_much_memory() -> str:
    return (
        f"the query needs more than {MAX_HEAP // 2**20} MB of memory and was stopped; select fewer or shorter "
        "values, or sort less"
    )


def connect(uri: str, seconds: float) -> sqlite3.Connection:
    """A connection that can only read, with all limits set; `seconds` from now its statements stop."""
    conn = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=seconds)
    try:
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.execute("PRAGMA query_only = ON")
        conn.execute("PRAGMA temp_store = MEMORY")  # so that sorting is bound by the heap, not by the disk
        # The ledger's views read JSON, which some versions of SQLite allow to trusted schemas alone. The authorizer
        # sees every function that a view uses, and denies the dangerous ones there too.
        conn.execute("PRAGMA trusted_schema = ON")
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


def _rows(cursor: sqlite3.Cursor, limit: int, chars: int) -> tuple[list[list[Any]], bool]:
    """Rows of values that JSON can hold, and whether some were left out. At least one row, if there is one."""
    rows: list[list[Any]] = []
    for row in cursor:  # one at a time: a row may be large before it is cut
        if len(rows) == limit:
            return rows, True
        cells = [_cell(value) for value in row]
        chars += sum(len(cell) if isinstance(cell, str) else 8 for cell in cells)
        if chars > MAX_ANSWER:
            if rows:
                return rows, True
            return [_shorter(cells)], next(cursor, None) is not None
        rows.append(cells)
    return rows, False


def _shorter(cells: list[Any]) -> list[Any]:
    """A row that is too long by itself, with each text cut to its share."""
    share = MAX_ANSWER // len(cells)
    return [f"{c[:share]}... (cut)" if isinstance(c, str) and len(c) > share else c for c in cells]


def _cell(value: Any) -> Any:
    """A value that JSON can hold, cut if it is long."""
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, str) and len(value) > MAX_CELL:
        return f"{value[:MAX_CELL]}... (cut; {len(value):,} characters)"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value


def _explain(conn: sqlite3.Connection | None, sql: str, error: Exception) -> str:
    """The error message, with what the author of the SQL needs to correct it."""
    text = str(error)
    if any(sign in text for sign in ("authoriz", "prohibited", "readonly")):
        return f"{text}: only reading is allowed, with one SELECT; to change the ledger, use the tools for it"
    if "one statement" in text:
        return "sql holds more than one statement; send one SELECT at a time"
    if conn is None:
        return f"{text} (the ledger could not be opened for reading)"
    if "no such table" in text:
        return f"{text}; the tables are {', '.join(tables(conn))}"
    if "no such column" in text or "ambiguous column" in text:
        columns = (
            f"{name}({', '.join(_columns(conn, name))})" for name in tables(conn) if _mentions(sql, name)
        )
        return f"{text}; the columns are {'; '.join(columns)}"
    return f"{text[:600]}; sql was {sql[:200]!r}"


def too_slow(seconds: float) -> str:
    """The message for a query that was stopped."""
    return f"the query took longer than {seconds:g} s and was stopped; narrow it down or add a LIMIT"


def tables(conn: sqlite3.Connection) -> list[str]:
    """The names of the tables and views that are worth a look."""
    conn.set_progress_handler(None, 0)
    rows = conn.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")
    return [name for (name,) in rows if not name.startswith(("edits_fts_", "sqlite_", "_sqlite"))]


def _columns(conn: sqlite3.Connection, table: str) -> list[str]:
    return [name for (name,) in conn.execute("SELECT name FROM pragma_table_info(?)", [table])]


def _mentions(sql: str, table: str) -> bool:
    return re.search(rf"\b{table}\b", sql, re.IGNORECASE) is not None


def _limit_memory() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as conn:
        conn.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")  # of the process, not of the connection
    if sys.platform != "win32":
        import resource

        with contextlib.suppress(OSError, ValueError):  # macOS does not limit address space
            resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer requests until standard input ends."""
    _limit_memory()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
