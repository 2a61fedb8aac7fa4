"""Recognising that memory or the disk ran out, whichever library says so, and what can be done about it."""

from __future__ import annotations

import errno
import re

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SPACE = re.compile(r"no space left|disk is full|disk quota|file too large|not enough (disk )?space", re.I)
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|failed to allocate|bad_alloc",
    re.I,
)
_BYTES = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.I)
_TOLD_BY = ("SafetensorError", "OperationalError")  # of safetensors and sqlite3: the text alone says it
_DEEP = 8  # causes that are followed


def exhausted(error: BaseException) -> str | None:
    """What ran out, with what helps; None for any other failure. Follows the causes of an error."""
    seen: BaseException | None = error
    for _ in range(_DEEP):
        if seen is None:
            return None
        if _is_disk(seen):
            return _disk(seen)
        if _is_memory(seen):
            return _memory(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _is_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _DISK:
        return True
    told = isinstance(error, OSError | RuntimeError) or type(error).__name__ in _TOLD_BY
    return told and _NO_SPACE.search(str(error)) is not None


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def _disk(error: BaseException) -> str:
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return (
        f"the disk is full or a quota is used up{where}; free some space and call again. Nothing that was recorded "
        "is lost"
    )


def _memory(error: BaseException) -> str:
    gpu = "CUDA" in str(error) or type(error).__name__ == "OutOfMemoryError"
    asked = _BYTES.search(str(error))
    size = f" ({asked[1]} were asked for)" if asked else ""
    return (
        f"{'the GPU' if gpu else 'the machine'} has not enough free memory{size}; send fewer edits in one call, take a "
        "method of fewer layers, close other programs, or start the server with --dtype bfloat16 or a smaller model. "
        "Nothing was changed"
    )


def in_words(size: float) -> str:
    """A number of bytes with the unit that fits it: "512 bytes", "3.2 MB", "15.0 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
