"""Compaction of HOME: deletes patch files that are no longer needed; the history stays whole.

What goes by itself are files of former states: what was left of a patch while some of its edits were reverted (made
again from the whole patch whenever it is needed), vectors that were removed, patches of proposals that were decided.
What goes only when it is asked for are the patches of edits that were given up long ago; those edits stay on the ledger
and cannot be reapplied from their patch any more. A patch with an active edit is never touched.

The event comes first, the files go afterwards. A process that is killed in between leaves files that are no longer
needed, which the next compaction deletes.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from store.canonical import now, utc_text
from store.chain import NewEvent, append_event
from store.connection import Connection
from store.errors import LedgerError, MissingBlob, RemovedBlob
from store.history import COMPACTED, History
from store.records import Who

BY_COMMAND = Who("errata-mcp compact")


@dataclass(frozen=True)
class GivenUp:
    """Which edits count as given up: rejected or replaced, or reverted, at least so many days ago. None: no edits."""

    retired_days: float | None = None
    reverted_days: float | None = None

    def statuses(self) -> dict[str, str]:
        """Status -> the latest time of its last change at which an edit counts as given up."""
        days = {"rejected": self.retired_days, "replaced": self.retired_days, "reverted": self.reverted_days}
        start = datetime.now(UTC)
        return {s: utc_text(start - timedelta(days=d)) for s, d in days.items() if d is not None}


@dataclass(frozen=True)
class Removable:
    """Files that can be deleted, and the edits that cannot be reapplied without them."""

    former: dict[str, int]  # SHA-256 -> bytes, of former states
    patches: dict[str, int]  # of patches whose edits are given up
    leftover: dict[str, int]  # of a compaction that was cut off
    edit_ids: tuple[str, ...]

    @property
    def files(self) -> dict[str, int]:
        """All of them."""
        return self.former | self.patches | self.leftover


@dataclass(frozen=True)
class CompactReport:
    """What was deleted, or would be, and the size of the database in bytes."""

    removed: Removable
    database_before: int
    database_after: int
    note: str = ""  # why the database was not written anew


class Compaction(Connection):
    """The methods of the ledger that free room."""

    def removable(self, given_up: GivenUp) -> Removable:
        """What can be deleted; reads the whole history and changes nothing."""
        history, whole = History(self.all_events()), self._whole()
        present = {sha: self.blobs.size(sha) for sha in self.blobs.names() & history.blobs}
        kept = self._kept()
        patches, edit_ids = self._given_up(given_up, kept)
        unused = {sha: size for sha, size in present.items() if sha not in kept}
        leftover = {sha: size for sha, size in unused.items() if sha in history.removed}
        return Removable(
            {s: n for s, n in unused.items() if s not in leftover and s not in whole},
            {s: n for s, n in unused.items() if s not in leftover and s in patches},
            leftover,
            tuple(edit_ids),
        )

    def remove(self, found: Removable) -> None:
        """Record that files are not needed any more, and delete them. Raises LedgerReadOnly or LedgerError."""
        new = sorted({**found.former, **found.patches})
        if new:
            payload = {"files": new, "bytes": sum(found.files.values()), "edits": list(found.edit_ids)}
            with self._write() as db:
                append_event(db, NewEvent(kind=COMPACTED, payload=payload), BY_COMMAND, now())
        for sha in found.files:
            self.blobs.remove(sha)

    def vacuum(self) -> None:
        """Give back the free pages of the database. Raises LedgerError where there is no room to write it anew."""
        self._check_writable()
        with self._writer, self._mutex, self._reading:
            try:
                self._db.conn.execute("VACUUM")
                self._db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.Error as error:
                raise LedgerError(
                    f"{self.path} could not be written anew and stays as large as it is: {error}"
                ) from error

    def patch_bytes(self, sha: str) -> bytes:
        """The content of a patch file. Raises RemovedBlob where a compaction deleted it, else as `Blobs.get`."""
        try:
            return self.blobs.get(sha)
        except MissingBlob:
            at = self.compacted_at(sha)
            if at is None:
                raise
            raise RemovedBlob(
                f"its patch file was deleted by errata-mcp compact at {at[:16]}; apply_edits with its subject, prompt "
                "and target (show_edit has them) makes it again"
            ) from None

    def compacted_at(self, sha: str) -> str | None:
        """When a compaction deleted a file; None for a file that none did."""
        row = self._row(
            "SELECT at FROM events WHERE kind = ? AND instr(payload, ?) ORDER BY seq DESC LIMIT 1",
            (COMPACTED, sha),
        )
        return None if row is None else str(row["at"])

    def all_events(self) -> list[dict[str, Any]]:
        """As ReadingMethods has it."""
        raise NotImplementedError

    def _kept(self) -> set[str]:
        """The files that are always needed: of active patches, of vectors, of open proposals."""
        rows = self._rows(
            "SELECT source_blob AS sha FROM patches WHERE blob IS NOT NULL"
            " UNION SELECT blob FROM patches WHERE blob IS NOT NULL UNION SELECT blob FROM vectors"
            " UNION SELECT blob FROM proposals WHERE state = 'waiting' AND blob IS NOT NULL"
        )
        return {row["sha"] for row in rows}

    def _whole(self) -> set[str]:
        """The files of patches as they were computed."""
        return {row["source_blob"] for row in self._rows("SELECT DISTINCT source_blob FROM patches")}

    def _given_up(self, given_up: GivenUp, kept: set[str]) -> tuple[set[str], list[str]]:
        """The files of patches all of whose edits are given up, and the ids of these edits.

        A file that several patches share goes only where all of them are.
        """
        until = given_up.statuses()
        rows = self._rows(
            "SELECT e.id, e.status, e.changed, p.source_blob FROM edits e JOIN patches p ON p.id = e.patch_id ORDER BY"
            " e.seq"
        )
        needed = {r["source_blob"] for r in rows if r["changed"] > until.get(r["status"], "")} | kept
        gone = [
            r for r in rows if r["source_blob"] not in needed and self.blobs.path(r["source_blob"]).exists()
        ]
        return {r["source_blob"] for r in gone}, [r["id"] for r in gone]


def size_of(path: Path) -> int:
    """The bytes of a database and of the log beside it."""
    return sum(p.stat().st_size for p in (path, Path(f"{path}-wal")) if p.exists())
