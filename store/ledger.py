"""The ledger: every change, when, by whom, why, and how well it holds. An SQLite file in HOME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock
from sqlite_utils import Database

from store.connection import DATABASE, file_uri, lock_home, open_database
from store.errors import LedgerError
from store.jobs import Jobs
from store.query import Queries, QueryResult, describe_schema
from store.reading import Reading
from store.recording import Recording
from store.records import Problem
from store.vectors import Vectors
from store.verify import verify

_OTHERS_START = 10.0  # seconds to wait for another process that is creating the ledger


class Ledger(Recording, Reading, Jobs, Vectors):
    """An open ledger: reading, recording and jobs. Safe to use from any thread.

    Every change is one transaction together with its event. When a method returns, it is on the disk.
    """

    def __init__(self, home: Path, db: Database, lock: FileLock | None) -> None:
        super().__init__(home, db, lock)
        self._queries = Queries()

    @classmethod
    def open(cls, home: Path, read_only: bool = False) -> Self:
        """Open HOME/ledger.db; create it if it does not exist.

        Without `read_only`, HOME is locked until `close` or the end of the process. With it there is
        no lock, and another process may be writing. Raises LedgerInUse, DamagedLedger, NewerLedger or
        LedgerError.
        """
        home = Path(home)
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"the home folder {home} cannot be created: {error.strerror or error}"
            ) from error
        path = home / DATABASE
        if read_only:
            _make_if_missing(home, path)
            return cls(home, open_database(path, write=False), None)
        lock = lock_home(home)
        try:
            ledger = cls(home, open_database(path, write=True), lock)
        except BaseException:
            lock.release()
            raise
        ledger.blobs.sweep()
        return ledger

    def verify(self, files: bool = True) -> list[Problem]:
        """Check the ledger; returns every problem, or an empty list.

        Checks the database, the hash chain, every row against the events, and (unless `files` is
        False) that every patch file exists and has its hash.
        """
        with self._mutex:
            self._check_open()
            return verify(lambda sql: self._db.conn.execute(sql).fetchall(), self.blobs, DATABASE, files)

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        limit: int = 100,
        seconds: float = 5.0,
    ) -> QueryResult:
        """Run one SELECT. Raises QueryError for any other statement, an error, or too much time or memory."""
        self._check_open()
        return self._queries.run(file_uri(self.path, "ro"), sql, params, limit, seconds)

    def schema(self) -> str:
        """The tables as SQL, with comments."""
        return describe_schema(file_uri(self.path, "ro"))

    def close(self) -> None:
        """Close the database and release HOME. May be called twice."""
        self._queries.close()
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_if_missing(home: Path, path: Path) -> None:
    """Create an empty ledger, so that a reader of a new HOME sees one."""
    if path.exists() and path.stat().st_size > 0:
        return
    lock = lock_home(home, timeout=_OTHERS_START)
    try:
        open_database(path, write=True).close()
    finally:
        lock.release()
