"""Running SQL that a client wrote, in processes of their own (store/query_process.py) that can be ended."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import QueryError
from store.query_process import MAX_SQL, TIME_IS_OVER, connect, too_slow

MAX_ROWS = 1_000
AT_ONCE = 4  # queries that run beside one another
_PROGRAM = str(Path(__file__).with_name("query_process.py"))
_ASKED = 0.8  # SQLite's share of the time that a caller gives; the rest is for the process and its answer
_KILLED = 0.9  # share of that time after which a process that has not ended itself is killed


class QueryResult(NamedTuple):
    """The result of a query: column names, rows of JSON values, and whether rows were left out."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


class Queries:
    """Runs queries on one database, each in a process. A process that ended its query takes the next one."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(AT_ONCE)
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        self._closed = False

    def run(
        self,
        uri: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        limit: int = 100,
        seconds: float = 5.0,
    ) -> QueryResult:
        """Run one SELECT on the database that `uri` names. Raises QueryError with what is wrong.

        The answer, or that error, is there after `seconds` at most; to wait for others, or for a process, counts too.
        """
        end = time.monotonic() + seconds
        if not 1 <= limit <= MAX_ROWS:
            raise QueryError(f"limit {limit} is out of range; it goes from 1 to {MAX_ROWS:,}")
        if not sql.strip():
            raise QueryError("sql is empty; write one SELECT statement")
        if len(sql) > MAX_SQL:
            raise QueryError(f"sql has {len(sql):,} characters; the most is {MAX_SQL:,}")
        values = dict(params) if isinstance(params, Mapping) else list(params or ())
        request = {"uri": uri, "sql": sql, "params": values, "limit": limit}
        try:
            json.dumps(request)
        except TypeError as error:
            raise QueryError(
                f"params cannot be used: {error}; give texts, numbers, booleans or null"
            ) from None
        answer = self._ask(request, seconds, end)
        if "error" in answer:
            raise QueryError(answer["error"])
        if not answer["columns"]:
            raise QueryError("the statement returns no rows; only one SELECT statement can be run")
        return QueryResult(**answer)

    def close(self) -> None:
        """End the process that waits for a query. May be called twice."""
        with self._lock:
            self._closed = True
            processes, self._idle = self._idle, []
        for process in processes:
            _end(process)

    def _ask(self, request: Mapping[str, Any], seconds: float, end: float) -> dict[str, Any]:
        if not self._free.acquire(timeout=seconds * _ASKED):
            raise QueryError(f"{AT_ONCE} other queries are running; try again in a moment")
        try:
            process, left = self._take(), max(0.0, end - time.monotonic())
            clock = _Clock(process, left * _KILLED)
            try:
                said = _exchange(process, json.dumps({**request, "seconds": left * _ASKED}))
                return {"error": too_slow(seconds)} if clock.struck or said is None else said
            finally:
                clock.stop()
                self._give_back(process)
        finally:
            self._free.release()

    def _take(self) -> subprocess.Popen[str]:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return _start()
            if process.poll() is None:
                return process
            _end(process)

    def _give_back(self, process: subprocess.Popen[str]) -> None:
        """Keep the process for another query, unless it is broken."""
        with self._lock:
            if process.poll() is None and not self._closed:
                self._idle.append(process)
                return
        _end(process)


class _Clock:
    """Kills a process after some seconds, whatever it is doing."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.struck = False
        self._process = process
        self._timer = threading.Timer(seconds, self._strike)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Let the process live on."""
        self._timer.cancel()

    def _strike(self) -> None:
        self.struck = True
        self._process.kill()


def _start() -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(  # -I -S: the standard library alone, whatever the environment says
            [sys.executable, "-I", "-S", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
    except OSError as error:
        raise QueryError(f"no process can be started for the query: {error.strerror or error}") from error


def _exchange(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """What the process answers; None when its time was over."""
    assert process.stdin is not None
    assert process.stdout is not None
    said = ""
    with contextlib.suppress(OSError):  # a process that has ended: its status says why
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        said = process.stdout.readline()
    if said.endswith("\n"):
        answer: dict[str, Any] = json.loads(said)
        return answer
    process.kill()
    code = process.wait()
    if code == TIME_IS_OVER:
        return None
    return {
        "error": f"the query was ended by the system (status {code}); it needs too much time or memory, so "
        "select fewer or shorter values"
    }


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def describe_schema(uri: str) -> str:
    """The tables as SQL with their comments, for the author of a query."""
    try:
        with contextlib.closing(connect(uri, 5.0)) as conn:
            return _HEAD + "".join(f"{text};\n\n" for text in _statements(conn)).rstrip() + "\n"
    except sqlite3.Error as error:
        raise QueryError(f"the schema cannot be read: {error}") from error


def _statements(conn: sqlite3.Connection) -> Iterator[str]:
    sql = "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND sql IS NOT NULL ORDER BY rowid"
    for (text,) in conn.execute(sql):
        if not re.match(r"CREATE TABLE ['\"\[]?(edits_fts_|sqlite_|_sqlite)", text):
            yield text


_HEAD = """\
-- The ledger, SQLite. Read-only: one SELECT at a time; JSON columns with json_extract(column, '$.name').
-- Active corrections, newest first:
--   SELECT id, subject, prompt, target, created FROM edits WHERE status = 'active' ORDER BY seq DESC
-- How an edit held over time:
--   SELECT at, occasion, reliability, generality, locality FROM measurements WHERE edit_id = 'e1' ORDER BY id
-- What happened, and who asked:
--   SELECT seq, at, kind, edit_ids, client, reason FROM events ORDER BY seq DESC

"""
