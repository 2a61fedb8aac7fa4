"""Files that are made once and used by many edits, and a check that they have not changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Made(Protocol):
    """Knows the SHA-256 of files that were made."""

    def note(self, digests: Mapping[Path, str]) -> None:
        """These files are about to be written."""

    def check(self, path: Path, digest: str) -> None:
        """Raise EditError when a file with this SHA-256 is not the one that was made."""


class NotKept:
    """Keeps no digests."""

    def note(self, digests: Mapping[Path, str]) -> None:
        return

    def check(self, path: Path, digest: str) -> None:
        return
