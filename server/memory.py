"""What bounds the server's memory: freed memory goes back to the system, kernels are kept in bounded number.

glibc gives each of a server's many threads a heap of its own, and keeps what is freed in it for later; after a thousand
calls half of the memory was such holes. oneDNN keeps the last 1,024 kernels it has made, one for each shape of a
product: texts come in all lengths, so these were 125 MB after one training of a model of 0.1 MB.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from functools import cache
from typing import Any

from editors.constants import DEFAULT_MODEL, assumed, tuned

HEAPS = 2
"""Heaps of glibc at most: threads that work on the model take turns, so that they need no heap each."""
KERNELS = tuned(
    128,
    "kernels that oneDNN keeps at most (its own default is 1,024)",
    models=DEFAULT_MODEL,
    command="two edits by apply_edits(method='rome') with 1,024, 128 and 32, one thread",
    figure="second edit 11.5, 12.0 and 11.6 CPU seconds, which is noise; memory after one training of MEND on the "
    "tests' tiny llama 548 MB with 1,024, 433 MB with 64",
)
REST = assumed(
    2.0,
    "seconds between two times that freed memory is given back",
    "it takes some milliseconds, and what a second of calls leaves is little",
)
_M_ARENA_MAX = -8  # of mallopt, in glibc's malloc.h


@cache
def _glibc() -> Any:
    """The C library, or None where it is another than glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def keep_flat() -> None:
    """Bound what is kept. Call it before torch is imported; variables that the user has set are not changed."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    if (library := _glibc()) is not None and "MALLOC_ARENA_MAX" not in os.environ:
        library.mallopt(_M_ARENA_MAX, HEAPS)


class Tidy:
    """Gives freed memory back to the system, not more often than every `REST` seconds."""

    def __init__(self) -> None:
        self._last = 0.0
        self._mutex = threading.Lock()

    def __call__(self) -> None:
        """Give back what is free, unless that was done just now."""
        library = _glibc()
        if library is None or not self._mutex.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._last >= REST:
                library.malloc_trim(0)
                self._last = time.monotonic()
        finally:
            self._mutex.release()
