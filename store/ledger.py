"""The ledger: every change, when, by whom, why, and how well it holds. An SQLite file in HOME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from store.compaction import Compaction, CompactReport, GivenUp, size_of
from store.errors import DamagedLedger, LedgerError
from store.fact_sets import FactSets
from store.jobs import Jobs
from store.made_files import MadeFiles
from store.opening import DATABASE, Opened, open_for_reading, open_for_writing
from store.proposals import Proposals
from store.query import Queries, QueryResult, describe_schema
from store.reading import ReadingMethods
from store.recording import Recording
from store.records import Problem
from store.vectors import Vectors
from store.verify import verify


class Ledger(Recording, ReadingMethods, Compaction, Jobs, Vectors, FactSets, Proposals, MadeFiles):
    """An open ledger: reading, recording, jobs and proposals. Safe to use from any thread.

    Every change is one transaction together with its event. When a method returns, it is on the disk.
    """

    def __init__(self, home: Path, opened: Opened) -> None:
        super().__init__(home, opened)
        self._queries = Queries()

    @classmethod
    def open(cls, home: Path, read_only: bool = False) -> Self:
        """Open HOME/ledger.db; create it if it does not exist.

        Without `read_only`, HOME is locked until `close` or the end of the process. With it there is
        no lock, and another process may be writing. A ledger that has lost a part of its history opens with
        what is left, refuses to be written, and says in `lost` what is missing.

        Raises LedgerInUse, DamagedLedger, NewerLedger or LedgerError.
        """
        home = Path(home)
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"the home folder {home} cannot be created: {error.strerror or error}"
            ) from error
        return cls(home, open_for_reading(home) if read_only else open_for_writing(home))

    def verify(self, files: bool = True) -> list[Problem]:
        """Check the ledger; returns every problem, or an empty list.

        Checks the database, the hash chain, every row against the events, and (unless `files` is
        False) that every patch file exists and has its hash.
        """
        with self._mutex:
            self._check_open()
            return self._problems(files)

    def _problems(self, files: bool = False) -> list[Problem]:
        lost = [Problem("chain", DATABASE, self.lost)] if self.lost else []
        return lost + verify(
            lambda sql: self._db.conn.execute(sql).fetchall(), self.blobs, DATABASE, self._opened.uri, files
        )

    def compact(self, given_up: GivenUp, *, dry: bool = False) -> CompactReport:
        """Delete the files that nothing needs, and give back free pages; with `dry` only say what would go.

        Raises DamagedLedger where something is damaged: then nothing is deleted.
        """
        if problems := self.verify():
            raise DamagedLedger(f"{self.home} is damaged, and nothing was deleted: {problems[0]}")
        before, found = size_of(self.path), self.removable(given_up)
        note = ""
        if not dry:
            self.remove(found)
            try:
                self.vacuum()
            except LedgerError as error:
                note = str(error)
        return CompactReport(found, before, size_of(self.path), note)

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        limit: int = 100,
        seconds: float = 5.0,
    ) -> QueryResult:
        """Run one SELECT. Raises QueryError for any other statement, an error, or too much time or memory."""
        self._check_open()
        return self._queries.run(self.uri, sql, params, limit, seconds)

    def schema(self) -> str:
        """The tables as SQL, with comments."""
        return describe_schema(self.uri)

    @property
    def uri(self) -> str:
        """The SQLite URI of the file, for a connection that reads. Raises DamagedLedger if it is lost."""
        if not self._opened.uri:
            raise DamagedLedger(self.lost)
        return self._opened.uri

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
