"""Reading regular files of bounded size: never a device, a pipe or an endless file."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
from pathlib import Path


class UnreadableFile(ValueError):
    """The file is no regular file, or too large; the message says which."""


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file, no more than `most` of them.

    Raises OSError for a file that cannot be read, and UnreadableFile for one that is larger, or that is a device,
    a pipe or a folder. The open file is checked, so that it cannot be replaced between the check and the read.
    """
    with _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableFile(f"it is larger than {most:,} bytes")
    return data


def read_unpacked(path: Path, most: int) -> bytes:
    """As read_bounded, unpacked where the name ends in .gz; also then no more than `most` bytes.

    Raises EOFError, gzip.BadGzipFile (an OSError) and zlib.error for a packed file that is damaged.
    """
    data = read_bounded(path, most)
    if path.suffix != ".gz":
        return data
    with gzip.open(io.BytesIO(data)) as packed:
        data = packed.read(most + 1)
    if len(data) > most:
        raise UnreadableFile(f"unpacked, it is larger than {most:,} bytes")
    return data


def read_regular(path: Path) -> bytes:
    """All bytes of a file that the server keeps itself. Raises OSError, and UnreadableFile for a pipe or a device."""
    with _opened(path) as file:
        return file.read()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a regular file, in hex, read piece by piece. Raises OSError and UnreadableFile."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_start(path: Path, most: int) -> bytes:
    """The first `most` bytes of a regular file. Raises OSError and UnreadableFile."""
    with _opened(path) as file:
        return file.read(most)


def _opened(path: Path) -> io.BufferedReader:
    """An open regular file. Opening a pipe does not wait for somebody to write into it."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile("it is not a regular file")
    return os.fdopen(descriptor, "rb")
