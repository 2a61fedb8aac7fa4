"""Digests of files that the server made for itself and can make again: statistics and trained editors.

They are not needed to replay the ledger, but edits are computed with them: one that another program changed would
silently change the next edit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from store.blobs import open_regular
from store.canonical import now, parse_json
from store.chain import NewEvent, append_event
from store.connection import Connection
from store.records import NOBODY, Problem, Who

CHANGED = (
    "was changed after the server made it; delete it: statistics are made again when they are needed, a trained editor "
    "by train_editor"
)
UNKNOWN = ""
"""In place of the digest of a file that is being made again."""
MADE = "files_made"
MADE_EVENTS = frozenset({MADE})


class MadeFiles(Connection):
    """The methods of the ledger for such files."""

    def record_made_files(self, digests: Mapping[Path, str], who: Who = NOBODY) -> None:
        """Record the SHA-256 of files under HOME, by path. Files elsewhere are not recorded.

        Raises LedgerReadOnly.
        """
        files = {
            path.relative_to(self.home).as_posix(): sha
            for path, sha in digests.items()
            if path.is_relative_to(self.home)
        }
        if files:
            with self._write() as db:
                append_event(db, NewEvent(kind=MADE, payload={"files": files}), who, now())

    def made_files(self) -> dict[Path, str]:
        """The latest SHA-256 of every such file; it need not exist any more."""
        rows = self._rows("SELECT payload FROM events WHERE kind = ? ORDER BY seq", (MADE,))
        found: dict[Path, str] = {}
        for row in rows:
            files = parse_json(row["payload"], {}).get("files", {})
            found |= {self.home / name: str(sha) for name, sha in files.items()}
        return found

    def changed_files(self) -> list[Problem]:
        """Every such file whose content is not the one that was recorded. Reads all of them, which takes a while."""
        return list(_changed(self.made_files()))


def _changed(made: Mapping[Path, str]) -> Iterator[Problem]:
    for path, sha in sorted(made.items()):
        try:
            with open_regular(path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:  # it is made again when it is needed
            continue
        except OSError as error:
            yield Problem("file", str(path), f"cannot be read: {error.strerror or error}")
            continue
        if sha not in (UNKNOWN, found):
            yield Problem("file", str(path), CHANGED)
