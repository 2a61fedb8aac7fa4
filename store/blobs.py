"""Patch files beside the ledger, each named by the SHA-256 of its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from store.errors import BlobError, DamagedBlob, MissingBlob

SUFFIX = ".safetensors"
_TEMPORARY = ".writing-"
_ANNOUNCED = ".announced"
_UNNAMED = ".unnamed"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits: the name a file gets."""
    return hashlib.sha256(data).hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened for reading. A pipe or a device in its place is an error and makes nobody wait.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


class Blobs:
    """A folder of files `<sha256>.safetensors`; bytes in, the same bytes out."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, sha: str) -> Path:
        """The path of a blob. Raises BlobError if `sha` is not a SHA-256 in hex."""
        if not _SHA256.fullmatch(sha):
            raise BlobError(
                f"{sha!r} is not the name of a patch file; it must be 64 lower-case hexadecimal digits"
            )
        return self.folder / f"{sha}{SUFFIX}"

    def put(self, data: bytes) -> str:
        """Store bytes and return their SHA-256 (hex).

        On return the file and its folder entry are on the disk. Storing the same bytes again
        changes nothing, unless the file is damaged: then it is written again.
        """
        sha = sha256(data)
        path = self.path(sha)
        if not self._holds(path, data):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(path, data)
        _sync_folder(self.folder)
        return sha

    def get(self, sha: str) -> bytes:
        """Read the bytes back. Raises MissingBlob or DamagedBlob, naming the file."""
        path = self.path(sha)
        try:
            with open_regular(path) as file:
                data = file.read()
        except FileNotFoundError:
            raise MissingBlob(f"patch file {path} is missing; restore it from a backup") from None
        except OSError as error:
            raise DamagedBlob(f"patch file {path} cannot be read: {error.strerror or error}") from error
        actual = sha256(data)
        if actual != sha:
            raise DamagedBlob(
                f"patch file {path} is damaged: its {len(data):,} bytes have SHA-256 {actual[:12]}..., "
                "not the one in its name; restore it from a backup"
            )
        return data

    def verify(self, sha: str) -> None:
        """Raise MissingBlob or DamagedBlob unless the file exists and has the hash in its name."""
        self.get(sha)

    def size(self, sha: str) -> int:
        """Size of the file in bytes. Raises MissingBlob."""
        path = self.path(sha)
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise MissingBlob(f"patch file {path} is missing; restore it from a backup") from None

    def describe(self, sha: str, about: str) -> None:
        """Write a description (JSON) beside a file, for the case that nothing else is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self._description(sha), about.encode())

    def description(self, sha: str) -> dict[str, Any] | None:
        """The description that `describe` wrote; None if there is none, or it cannot be read."""
        try:
            with open_regular(self._description(sha)) as file:
                about = json.load(file)
        except (OSError, ValueError):
            return None
        return about if isinstance(about, dict) else None

    def _description(self, sha: str) -> Path:
        return self.path(sha).with_suffix(".json")

    def remove(self, sha: str) -> None:
        """Delete a file and its description. Does nothing if they do not exist or cannot be deleted."""
        for path in (self.path(sha), self._description(sha)):
            with contextlib.suppress(OSError):
                path.unlink()

    def names(self) -> set[str]:
        """The SHA-256 of every patch file."""
        names = (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))
        return {name for name in names if _SHA256.fullmatch(name)}

    def announce(self, sha: str) -> None:
        """Note on the disk that a file is about to be stored, so that it can be found if the process is killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _ANNOUNCED).open("a", encoding="ascii") as file:
            file.write(f"{sha}\n")
            file.flush()
            os.fsync(file.fileno())

    def announced(self) -> set[str]:
        """The announced files of an unfinished change, or of one during which a writer was killed."""
        return self._listed(_ANNOUNCED)

    def _listed(self, name: str) -> set[str]:
        try:
            lines = (self.folder / name).read_text("ascii", "replace").split()
        except OSError:
            return set()
        return {line for line in lines if _SHA256.fullmatch(line)}

    def known_unnamed(self) -> set[str]:
        """The files without an event that were there before files were announced (see `keep_unnamed`)."""
        return self._listed(_UNNAMED)

    def keep_unnamed(self, shas: set[str]) -> None:
        """Note that these files have no event, and that this is known."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _UNNAMED).write_text("".join(f"{sha}\n" for sha in sorted(shas)), "ascii")

    def settle(self) -> None:
        """Note that the change is finished: every announced file is named by an event now, or removed."""
        with contextlib.suppress(OSError):
            (self.folder / _ANNOUNCED).unlink()

    def sweep(self, is_named: Callable[[str], bool]) -> None:
        """Delete what a killed writer left: partial files, and announced files that no event names. Call it only
        while holding the lock of HOME.
        """
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.unlink()
        for sha in self.announced():
            if not is_named(sha):
                self.remove(sha)
        self.settle()

    @staticmethod
    def _holds(path: Path, data: bytes) -> bool:
        try:
            return path.stat().st_size == len(data) and path.read_bytes() == data
        except OSError:
            return False

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
