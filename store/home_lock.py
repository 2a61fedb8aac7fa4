"""The lock that allows one writer for HOME.

It is two locks: one on the file `lock`, which all versions take, and one on the folder itself, which holds even
when somebody deletes the file. The operating system releases both when the process ends in any way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from store.errors import LedgerError, LedgerInUse

LOCK = "lock"
_NO_FOLDER_LOCKS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EISDIR}
_PAUSE = 0.05  # seconds between two attempts


class HomeLock:
    """Held from its creation to `release`. Raises LedgerInUse or LedgerError."""

    def __init__(self, home: Path, timeout: float = 0.0) -> None:
        path = home / LOCK
        end = time.monotonic() + timeout
        self._file = FileLock(path, timeout=timeout, thread_local=False, fallback_to_soft=False)
        self._folder: int | None = None
        try:
            self._file.acquire()
            self._folder = _lock_folder(home, end)
        except Timeout:
            self._file.release()
            raise LedgerInUse(
                f"{home} is in use by another server{_holder(path)}; stop that one, start this one with "
                "another --home, or with --read-only"
            ) from None
        except OSError as error:
            self._file.release()
            raise LedgerError(
                f"{path} cannot be locked: {error.strerror or error}; use a --home you can write to"
            ) from error
        with contextlib.suppress(OSError):  # only for the error message of the next process
            path.write_text(f"{os.getpid()}\n")

    def release(self) -> None:
        """Let others write. May be called twice."""
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)
        self._file.release()


def is_held(home: Path) -> bool:
    """Whether a process writes to this home now."""
    try:
        HomeLock(home).release()
    except LedgerInUse:
        return True
    return False


def _lock_folder(home: Path, end: float) -> int | None:
    """An open descriptor of the folder, locked; None where folders cannot be locked. Raises Timeout, OSError."""
    if sys.platform == "win32":  # there a file that is locked cannot be deleted
        return None
    import fcntl

    descriptor = os.open(home, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise Timeout(str(home)) from None
                time.sleep(_PAUSE)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_FOLDER_LOCKS:  # some network file systems
            return None
        raise


def _holder(path: Path) -> str:
    try:
        return f" (process {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
