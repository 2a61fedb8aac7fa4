"""Files that the server made for itself: their digests stand on the ledger, and each is compared before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from editors.bounded_files import digest_of_file
from editors.errors import EditError
from store import Ledger
from store.made_files import CHANGED, UNKNOWN


class MadeOnLedger:
    """What `editors.made.Made` asks for, kept on the ledger while `may_write` says that it may be written."""

    def __init__(self, ledger: Ledger, may_write: Callable[[], bool]) -> None:
        self._ledger, self._may_write = ledger, may_write
        self._known = ledger.made_files()
        self._compared: dict[Path, tuple[int, ...]] = {}

    def note(self, digests: Mapping[Path, str]) -> None:
        """Record files that are about to be written, or were just written, by their SHA-256."""
        self._known |= digests
        if self._may_write():
            self._ledger.record_made_files(digests)

    def check(self, path: Path, digest: str) -> None:
        """Raise EditError when the file with these contents is not the one that was made.

        A file without a recorded digest is recorded as it is: an older version made it, a person put it there, or a
        training ended while it wrote.
        """
        if self._known.get(path) not in (None, UNKNOWN, digest):  # another server may have made it anew
            self._known |= self._ledger.made_files()
        known = self._known.get(path)
        if known in (None, UNKNOWN):
            self.note({path: digest})
        elif known != digest:
            raise EditError(f"{path} {CHANGED}")

    def check_files(self, paths: Sequence[Path]) -> None:
        """As `check`, of files whose contents nobody has read yet; those compared before are not read again."""
        for path in paths:
            state = path.stat()
            stamp = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            if self._compared.get(path) != stamp:
                self.check(path, digest_of_file(path))
                self._compared[path] = stamp
