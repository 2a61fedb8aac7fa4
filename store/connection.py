"""An open HOME: transactions, the files that belong to them, and changes that others made."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sqlite_utils import Database

from store.blobs import Blobs, sha256
from store.canonical import canonical_json, now
from store.errors import DamagedLedger, LedgerError, LedgerReadOnly
from store.head import NO_EVENT, Head, write_head
from store.opening import DATABASE, Opened, connect, file_uri, open_for_reading, stamp
from store.records import Problem


class Put(Protocol):
    """Stores bytes and their description; returns their SHA-256."""

    def __call__(self, data: bytes, about: Mapping[str, Any] | None = None) -> str: ...


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Connection:
    """An open HOME: an SQLite connection that any thread may use, one at a time, and where it is written a second one.

    Reading uses the second one, so that it does not wait for a COMMIT, which takes as long as the disk. Only the thread
    that writes reads by the first, where it sees what it has not committed yet.
    """

    def __init__(self, home: Path, opened: Opened) -> None:
        self.home = home
        self.path = home / DATABASE
        self.blobs = Blobs(home / "blobs")
        self._opened = opened
        self._db = opened.db
        self._writer = threading.RLock()  # held from the first file of a change to its COMMIT
        self._mutex = threading.RLock()  # held while the connection is used; taken after _writer
        self._reader: sqlite3.Connection | None = None  # the second connection, used while _reading is held
        self._reading = threading.RLock()
        self._closed = False
        self._refused = opened.lost  # why nothing may be written, although this is the writer
        self._heads: set[Head] = (
            set()
        )  # possible last events; two while it is unknown whether a COMMIT succeeded
        self._version = self._data_version()
        self._listeners: list[Callable[[], None]] = []
        if not self.read_only:
            self._begin_writing()
            self._reader = connect(file_uri(self.path, "ro"))

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every commit, in the thread that wrote. It must be quick and must not raise."""
        self._listeners.append(listener)

    @property
    def read_only(self) -> bool:
        """True if nothing can be written."""
        return self._opened.lock is None or bool(self._opened.lost)

    @property
    def lost(self) -> str:
        """Which part of the recorded history the database has lost; empty if none."""
        return self._opened.lost

    def close(self) -> None:
        """Close the database and release HOME. May be called twice."""
        with self._mutex, self._reading:
            if self._closed:
                return
            self._closed = True
            if self._reader is not None:
                self._reader.close()
            self._opened.close()

    def changed(self) -> bool:
        """True if another process has written since the last call; what it wrote can be read from now on."""
        with self._mutex:
            self._check_open()
            if self._opened.seen is not None:  # neither a copy nor an immutable file shows what others write
                if self._opened.seen == stamp(self.path):
                    return False
                self._reopen()
                return True
            before, self._version = self._version, self._data_version()
            return before != self._version

    def _reopen(self) -> None:
        opened = open_for_reading(self.home)
        former, self._opened, self._db = self._opened, opened, opened.db
        former.close()

    def _begin_writing(self) -> None:
        """Note the last event, and remove the files that a killed writer left."""
        self._heads = {self._head()}
        self._version = self._data_version()
        self.blobs.sweep(self._is_named)
        write_head(self.home, self._head())

    def _head(self) -> Head:
        row = self._db.conn.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        return NO_EVENT if row is None else Head(row["seq"], row["hash"])

    def _data_version(self) -> int:
        """A number that changes when another connection has changed the database."""
        return int(self._db.conn.execute("PRAGMA data_version").fetchone()[0])

    def _is_named(self, sha: str) -> bool:
        """True if an event names this file."""
        return self._row("SELECT 1 FROM events WHERE instr(payload, ?) LIMIT 1", (sha,)) is not None

    @contextlib.contextmanager
    def _write(self) -> Iterator[Database]:
        """One transaction: committed to the disk at the end, or rolled back if anything raises."""
        with self._writer, self._mutex:
            self._check_writable()
            try:
                try:
                    self._db.execute("BEGIN IMMEDIATE")
                    self._refuse_foreign_changes()
                    yield self._db
                    self._heads.add(self._head())  # the last event, if the COMMIT is on the disk
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.conn.in_transaction:
                        self._db.conn.rollback()
                    raise
            except sqlite3.Error as error:
                raise LedgerError(
                    f"the ledger {self.path} could not be written: {error}; nothing was recorded{_full(error)}"
                ) from error
            except OSError as error:
                raise LedgerError(
                    f"{self.home} could not be written: {error}; nothing was recorded{_full(error)}"
                ) from error
            self._after_commit()
        for listener in self._listeners:
            listener()

    def _after_commit(self) -> None:
        """Move the log into the database file, then note outside it what was recorded."""
        with contextlib.suppress(
            sqlite3.Error
        ):  # the change is on the disk; the next commit tries this again
            self._db.conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            head = self._head()
            self._heads = {head}
            write_head(self.home, head)

    def _check_writable(self) -> None:
        if self._refused:
            raise DamagedLedger(f"nothing was recorded, as {self._refused}")
        if self._opened.lock is None:
            raise LedgerReadOnly(f"the ledger {self.path} is open read-only; nothing was recorded")
        self._check_open()

    def _refuse_foreign_changes(self) -> None:
        """Raise DamagedLedger if another program has written events, or changed what follows from them.

        Runs inside the transaction, so that nobody can write between the check and the COMMIT.
        """
        version, head = self._data_version(), self._head()
        if head not in self._heads:
            last = max(self._heads).seq
            self._refused = (
                f"another program wrote to {self.path} while this server had it open (the last event was {last}, and "
                f"is {head.seq} now); end that program and start this server again"
            )
        elif version != self._version and (found := self._problems()):
            self._refused = f"another program changed {self.path} while this server had it open: {found[0]}"
        if self._refused:
            raise DamagedLedger(f"nothing was recorded, as {self._refused}")
        self._version = version

    def _problems(self) -> list[Problem]:
        """What `Ledger.verify` finds, without looking at the files."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _new_files(self) -> Iterator[Put]:
        """Store files, then record them: gives a function that stores bytes and returns their SHA-256.

        The transaction that names the files goes inside. If it is not committed, the files that were
        not there before are removed again. Raises LedgerReadOnly, and LedgerError if a file cannot be
        written.
        """
        new: list[str] = []

        def put(data: bytes, about: Mapping[str, Any] | None = None) -> str:
            sha = sha256(data)
            try:
                if not self.blobs.path(sha).exists():
                    new.append(sha)
                    self.blobs.announce(sha)
                    if about is not None:
                        self.blobs.describe(sha, canonical_json({"at": now(), **about}))
                return self.blobs.put(data)
            except OSError as error:
                raise LedgerError(
                    f"{self.blobs.folder} cannot be written: {error}; nothing was recorded{_full(error)}"
                ) from error

        with self._writer:
            self._check_writable()
            before = self._last_event()
            try:
                yield put
            except BaseException as error:
                if not _disk_failed(error) and self._last_event() == before:
                    for sha in new:
                        self.blobs.remove(sha)
                    self.blobs.settle()
                raise
            self.blobs.settle()

    def _last_event(self) -> int:
        rows = self._rows("SELECT coalesce(max(seq), 0) AS seq FROM events")
        return int(rows[0]["seq"])

    @contextlib.contextmanager
    def _to_read(self) -> Iterator[sqlite3.Connection]:
        """The connection for reading, for this thread alone. Raises LedgerError when the ledger is closed."""
        writes = self._writer._is_owned()  # type: ignore[attr-defined]  # of RLock; a Condition uses it too
        with self._mutex if self._reader is None or writes else self._reading:
            self._check_open()
            yield self._db.conn if self._reader is None or writes else self._reader

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """In this block all reads see one state of the ledger."""
        with self._to_read() as conn:
            if conn.in_transaction:
                yield
                return
            conn.execute("BEGIN")
            try:
                yield
            finally:
                conn.execute("COMMIT")

    def _rows(self, sql: str, params: list[Any] | tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._to_read() as conn:
            try:
                rows: list[sqlite3.Row] = conn.execute(sql, params).fetchall()
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


def _full(error: Exception) -> str:
    """Advice for a disk that is full; empty for another failure."""
    full = "SQLITE_FULL" in getattr(error, "sqlite_errorname", "") or getattr(error, "errno", 0) in _FULL
    return ". The disk is full, or a quota is used up: free some space and try again" if full else ""
