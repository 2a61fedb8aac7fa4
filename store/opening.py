"""Opening the database of HOME: for the one writer, or for readers, on a disk that can be written or not."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sqlite_utils import Database

from store.blobs import Blobs
from store.errors import DamagedLedger, LedgerError
from store.head import missing_events, read_head
from store.home_lock import HomeLock
from store.migrations import is_behind, migrate

DATABASE = "ledger.db"
RECOVER = "restore a backup (errata-mcp restore), or see what is left (errata-mcp recover)"
_OTHERS_START = 10.0  # seconds to wait for another process that is creating the ledger


def require_ledger(home: Path) -> None:
    """Raise LedgerError if a home has no ledger, for commands that must not create one."""
    if not (home / DATABASE).exists():
        raise LedgerError(f"there is no ledger in {home}: it has no {DATABASE}; name the home with --home")


@dataclass
class Opened:
    """An open connection, and the files it belongs to."""

    db: Database
    uri: str  # what queries open; empty when there is no file
    lock: HomeLock | None = None
    lost: str = ""  # what the database has lost; nothing may be written then
    copy: tempfile.TemporaryDirectory[str] | None = None  # holds what is read, when it is not the file itself
    seen: tuple[int, ...] | None = None  # the files, when the connection does not see what others write

    def close(self) -> None:
        """Close the connection, then give the lock and the copy back."""
        try:
            self.db.close()
        finally:
            if self.lock is not None:
                self.lock.release()
            if self.copy is not None:
                self.copy.cleanup()


def open_for_writing(home: Path) -> Opened:
    """Lock HOME and open its database; create it in a HOME that is new.

    Raises LedgerInUse, DamagedLedger, NewerLedger or LedgerError.
    """
    path = home / DATABASE
    lock = HomeLock(home)
    try:
        if gone := _nothing_left(home):
            return Opened(_in_memory(), "", lock, gone)
        older = _is_of_an_older_version(path)
        db = open_database(path, write=True)
        if older:
            _keep_unnamed(Blobs(home / "blobs"), db)
        return Opened(db, file_uri(path, "ro"), lock, _lost(home, db))
    except BaseException:
        lock.release()
        raise


def open_for_reading(home: Path) -> Opened:
    """Open the database without a lock; another process may be writing. An empty one is made in a new HOME.

    Raises DamagedLedger, NewerLedger or LedgerError.
    """
    path = home / DATABASE
    if gone := _nothing_left(home):
        return Opened(_in_memory(), "", lost=gone)
    if _size(path) == 0:
        _create(home, path)
    opened = _open_readable(path)
    opened.lost = _lost(home, opened.db)
    return opened


def file_uri(path: Path, mode: str) -> str:
    """SQLite URI of a file; `mode` is ro, rw or rwc."""
    return f"file:{quote(str(path.resolve()))}?mode={mode}"


def forgiving_text(raw: bytes) -> str:
    """Decode a text column. Bytes that are not UTF-8 (a damaged row) must not make the rest unreadable."""
    return raw.decode("utf-8", "replace")


def open_database(path: Path, write: bool, *, immutable: bool = False) -> Database:
    """Connect, check that the file is a database, and migrate the tables.

    Raises DamagedLedger or LedgerError, naming the file.
    """
    uri = file_uri(path, "rwc" if write else "ro") + ("&immutable=1" if immutable else "")
    conn = None
    try:
        conn = connect(uri)
        if write:
            conn.execute("PRAGMA journal_mode = WAL")
        db = Database(conn, execute_plugins=False)
        migrate(db, write)
        if write:  # the tables are in the file itself from now on, whatever happens to the log beside it
            conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        return db
    except (sqlite3.Error, LedgerError) as error:
        if conn is not None:
            conn.close()
        if isinstance(error, LedgerError):
            raise type(error)(f"the ledger {path} cannot be used: {error}") from error
        raise DamagedLedger(
            f"the ledger {path} cannot be opened: {error}; {RECOVER}, or move it and {path.parent / 'blobs'} away "
            "to start anew"
        ) from error


def connect(uri: str) -> sqlite3.Connection:
    """A connection as the ledger uses it, from any thread."""
    conn = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, timeout=10)
    conn.row_factory = sqlite3.Row
    conn.text_factory = forgiving_text
    conn.execute("PRAGMA synchronous = FULL")
    conn.execute("PRAGMA foreign_keys = ON")
    return conn


def _in_memory() -> Database:
    db = Database(connect("file::memory:"), execute_plugins=False)
    migrate(db, True)
    return db


def _is_of_an_older_version(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with contextlib.closing(connect(file_uri(path, "ro"))) as conn:
            return is_behind(Database(conn, execute_plugins=False))
    except sqlite3.Error:
        return False


def _keep_unnamed(blobs: Blobs, db: Database) -> None:
    """Files that no event names are a sign of loss, but not those that an older version left when it was killed."""
    named = "SELECT 1 FROM events WHERE instr(payload, ?) LIMIT 1"
    blobs.keep_unnamed({sha for sha in blobs.names() if db.execute(named, [sha]).fetchone() is None})


# --- what was lost ---------------------------------------------------------------------------------


def _nothing_left(home: Path) -> str:
    """Signs that an empty database had a history before; empty if there are none."""
    path = home / DATABASE
    state = _state(path)
    if not state:
        return ""
    head, patches = read_head(home), len(Blobs(home / "blobs").names())
    signs = []
    if head is not None and head.seq:
        signs.append(f"head.json says that {head.seq} events were recorded")
    if patches:
        signs.append(f"blobs holds {patches} patch files")
    if state == "is missing" and _size(Path(f"{path}-wal")):
        signs.append("ledger.db-wal is there")
    if not signs:
        return ""
    return f"the ledger is lost: {path} {state}, but {' and '.join(signs)}; {RECOVER}"


def _state(path: Path) -> str:
    """What makes a database look new; empty for one that has events."""
    if not path.exists():
        return "is missing"
    if _size(path) == 0:
        return "is empty"
    try:
        with contextlib.closing(sqlite3.connect(file_uri(path, "ro"), uri=True)) as conn:
            tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_master")]
    except sqlite3.Error:
        return ""  # opening it reports what is wrong
    return "" if tables else "has no tables"


def _lost(home: Path, db: Database) -> str:
    try:
        lost = missing_events(home, lambda sql, params: db.execute(sql, params).fetchone())
    except sqlite3.Error as error:
        lost = f"the ledger {home / DATABASE} is damaged: {error}"
    return f"{lost}; {RECOVER}" if lost else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- reading ---------------------------------------------------------------------------------------


def _create(home: Path, path: Path) -> None:
    """Create an empty ledger, so that a reader of a new HOME sees one."""
    lock = HomeLock(home, timeout=_OTHERS_START)
    try:
        open_database(path, write=True).close()
    finally:
        lock.release()


def _open_readable(path: Path) -> Opened:
    """Open the file itself; if the disk cannot be written, without the files that SQLite keeps beside it."""
    uri = file_uri(path, "ro")
    try:
        with contextlib.closing(connect(uri)) as conn:
            conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
            behind = is_behind(Database(conn, execute_plugins=False))
    except sqlite3.DatabaseError as error:
        if not _needs_writing(error):
            return Opened(open_database(path, write=False), uri)  # whose error says what is wrong
        return _open_unwritable(path)
    if behind:  # a copy is brought up to date, the file is not
        return _open_copy(path)
    return Opened(open_database(path, write=False), uri)


def _needs_writing(error: sqlite3.DatabaseError) -> bool:
    """True where SQLite failed because it cannot make the files beside a database in WAL mode."""
    return error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR"))


def _open_unwritable(path: Path) -> Opened:
    seen = stamp(path)
    if _size(Path(f"{path}-wal")):  # what it holds is part of the ledger, and only a copy can be read with it
        return _open_copy(path)
    uri = file_uri(path, "ro") + "&immutable=1"
    with contextlib.closing(connect(uri)) as conn:
        if is_behind(Database(conn, execute_plugins=False)):
            return _open_copy(path)
    return Opened(open_database(path, write=False, immutable=True), uri, seen=seen)


def _open_copy(path: Path) -> Opened:
    """Read a copy in a temporary folder, with everything that its log holds, migrated to this version."""
    seen = stamp(path)
    folder = tempfile.TemporaryDirectory(prefix="errata-reading-")
    try:
        copy = Path(folder.name, DATABASE)
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
        db = open_database(copy, write=True)
        db.execute("PRAGMA query_only = ON")
        return Opened(db, file_uri(copy, "ro"), copy=folder, seen=seen)
    except OSError as error:
        folder.cleanup()
        raise LedgerError(f"the ledger {path} cannot be copied for reading: {error}") from error
    except BaseException:
        folder.cleanup()
        raise


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when the database or its log is written: their sizes and times."""
    parts: list[int] = []
    for suffix in ("", "-wal"):
        with contextlib.suppress(OSError):
            found = os.stat(f"{path}{suffix}")  # noqa: PTH116
            parts += [found.st_size, found.st_mtime_ns, found.st_ino]
    return tuple(parts)
