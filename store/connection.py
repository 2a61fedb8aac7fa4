"""Opening HOME: the database file, the lock that allows one writer, and transactions."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from sqlite_utils import Database

from store.blobs import Blobs, sha256
from store.errors import DamagedLedger, LedgerError, LedgerInUse, LedgerReadOnly
from store.migrations import migrate

DATABASE = "ledger.db"
LOCK = "lock"


def lock_home(home: Path, timeout: float = 0.0) -> FileLock:
    """Lock HOME for writing. The operating system releases the lock when the process ends in any way.

    Raises LedgerInUse if another process holds it (after `timeout` seconds).
    """
    path = home / LOCK
    lock = FileLock(path, timeout=timeout, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise LedgerInUse(
            f"{home} is in use by another server{_holder(path)}; stop that one, start this one with "
            "another --home, or with --read-only"
        ) from None
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be locked: {error.strerror or error}; use a --home you can write to"
        ) from error
    with contextlib.suppress(OSError):  # the process id is only for the error message of the next process
        path.write_text(f"{os.getpid()}\n")
    return lock


def _holder(path: Path) -> str:
    try:
        return f" (process {int(path.read_text())})"
    except (OSError, ValueError):
        return ""


def file_uri(path: Path, mode: str) -> str:
    """SQLite URI of a file; `mode` is ro, rw or rwc."""
    return f"file:{quote(str(path.resolve()))}?mode={mode}"


def forgiving_text(raw: bytes) -> str:
    """Decode a text column. Bytes that are not UTF-8 (a damaged row) must not make the rest unreadable."""
    return raw.decode("utf-8", "replace")


def open_database(path: Path, write: bool) -> Database:
    """Connect, check that the file is a database, and migrate the tables.

    Raises DamagedLedger or LedgerError, naming the file.
    """
    conn = None
    try:
        conn = sqlite3.connect(
            file_uri(path, "rwc" if write else "ro"),
            uri=True,
            check_same_thread=False,
            isolation_level=None,
            timeout=10,
        )
        conn.row_factory = sqlite3.Row
        conn.text_factory = forgiving_text
        if write:
            conn.execute("PRAGMA journal_mode = WAL")
        conn.execute("PRAGMA synchronous = FULL")
        conn.execute("PRAGMA foreign_keys = ON")
        db = Database(conn, execute_plugins=False)
        migrate(db, write)
        return db
    except (sqlite3.Error, LedgerError) as error:
        if conn is not None:
            conn.close()
        if isinstance(error, LedgerError):
            raise type(error)(f"the ledger {path} cannot be used: {error}") from error
        raise DamagedLedger(
            f"the ledger {path} cannot be opened: {error}; move it away to start a new one, "
            "or restore it from a backup"
        ) from error


class Connection:
    """An open HOME: one SQLite connection that any thread may use, one at a time."""

    def __init__(self, home: Path, db: Database, lock: FileLock | None) -> None:
        self.home = home
        self.path = home / DATABASE
        self.blobs = Blobs(home / "blobs")
        self._db = db
        self._file_lock = lock
        self._writer = threading.RLock()  # held from the first file of a change to its COMMIT
        self._mutex = threading.RLock()  # held while the connection is used; taken after _writer
        self._closed = False
        self._listeners: list[Callable[[], None]] = []

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every commit, in the thread that wrote. It must be quick and must not raise."""
        self._listeners.append(listener)

    @property
    def read_only(self) -> bool:
        """True if nothing can be written."""
        return self._file_lock is None

    def close(self) -> None:
        """Close the database and release HOME. May be called twice."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            try:
                self._db.close()
            finally:
                if self._file_lock is not None:
                    self._file_lock.release()

    @contextlib.contextmanager
    def _write(self) -> Iterator[Database]:
        """One transaction: committed to the disk at the end, or rolled back if anything raises."""
        with self._writer, self._mutex:
            if self.read_only:
                raise LedgerReadOnly(f"the ledger {self.path} is open read-only; nothing was recorded")
            self._check_open()
            try:
                try:
                    self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.conn.in_transaction:
                        self._db.conn.rollback()
                    raise
            except sqlite3.Error as error:
                raise LedgerError(
                    f"the ledger {self.path} could not be written: {error}; nothing was recorded"
                ) from error
            except OSError as error:
                raise LedgerError(
                    f"{self.home} could not be written: {error}; nothing was recorded"
                ) from error
        for listener in self._listeners:
            listener()

    @contextlib.contextmanager
    def _new_files(self) -> Iterator[Callable[[bytes], str]]:
        """Store files, then record them: gives a function that stores bytes and returns their SHA-256.

        The transaction that names the files goes inside. If it is not committed, the files that were
        not there before are removed again. Raises LedgerReadOnly, and LedgerError if a file cannot be
        written.
        """
        new: list[str] = []

        def put(data: bytes) -> str:
            sha = sha256(data)
            if not self.blobs.path(sha).exists():
                new.append(sha)
            try:
                return self.blobs.put(data)
            except OSError as error:
                raise LedgerError(
                    f"{self.blobs.folder} cannot be written: {error}; nothing was recorded"
                ) from error

        if self.read_only:
            raise LedgerReadOnly(f"the ledger {self.path} is open read-only; nothing was recorded")
        with self._writer:
            before = self._last_event()
            try:
                yield put
            except BaseException as error:
                if not _disk_failed(error) and self._last_event() == before:
                    for sha in new:
                        self.blobs.remove(sha)
                raise

    def _last_event(self) -> int:
        rows = self._rows("SELECT coalesce(max(seq), 0) AS seq FROM events")
        return int(rows[0]["seq"])

    def _rows(self, sql: str, params: list[Any] | tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._mutex:
            self._check_open()
            try:
                rows: list[sqlite3.Row] = self._db.conn.execute(sql, params).fetchall()
                return rows
            except sqlite3.DatabaseError as error:
                raise DamagedLedger(f"the ledger {self.path} could not be read: {error}") from error

    def _row(self, sql: str, params: list[Any] | tuple[Any, ...] = ()) -> sqlite3.Row | None:
        rows = self._rows(sql, params)
        return rows[0] if rows else None

    def _check_open(self) -> None:
        if self._closed:
            raise LedgerError(f"the ledger {self.path} is closed")


def _disk_failed(error: BaseException) -> bool:
    """True if a COMMIT may be on the disk although SQLite reports that it failed (an fsync that failed)."""
    return "SQLITE_IOERR" in getattr(error.__cause__, "sqlite_errorname", "")
