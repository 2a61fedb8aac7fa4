"""Patch files beside the ledger, each named by the SHA-256 of its content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from store.errors import BlobError, DamagedBlob, MissingBlob

SUFFIX = ".safetensors"
_TEMPORARY = ".writing-"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits: the name a file gets."""
    return hashlib.sha256(data).hexdigest()


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
            data = path.read_bytes()
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

    def remove(self, sha: str) -> None:
        """Delete a file. Does nothing if it does not exist or cannot be deleted."""
        with contextlib.suppress(OSError):
            self.path(sha).unlink()

    def sweep(self) -> None:
        """Delete the partial files a killed writer left. Call it only while holding the lock of HOME."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.unlink()

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
