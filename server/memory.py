"""Keeps the server's memory small: freed memory goes back to the system, and few kernels are cached.

glibc gives each of a server's many threads a heap of its own, and keeps what is freed in it for later; after a thousand
calls half of the memory was such holes. oneDNN keeps the last 1,024 kernels it has made, one for each shape of a
product: texts come in all lengths, so these were 125 MB after one training of a model of 0.1 MB. PyTorch's own layer
above it, ideep, keeps 1,024 more in each thread, however few oneDNN itself may keep.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from functools import cache
from typing import Any

from editors.constants import DEFAULT_MODEL, limit, tuned

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
PREPARED = tuned(
    16,
    "products prepared for oneDNN that each thread keeps at most (ideep's own default is 1,024)",
    models=DEFAULT_MODEL,
    command="three previews by method='rome' with 1,024 and 16, one thread",
    figure="later previews 10.7, 10.3 and 10.4, 10.5 CPU seconds, which is noise; 180 products of as many lengths in "
    "bfloat16 keep 90 MB more with 1,024 than with 16",
)
REST = limit(
    2.0,
    "seconds between two times that freed memory is given back",
    "time: giving back takes some milliseconds; what a second of calls leaves is held for so long",
)
WHOLE = limit(
    60.0,
    "seconds between two garbage collections of all objects; Python itself seldom makes one, see server/priority.py",
    "time: a collection holds up reads for 150 ms with 100 clients; tensors in the cycles that errors "
    "leave are held for so long",
)
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "MALLOC_ARENA_MAX")
"""Environment variables by which a user sets other bounds."""
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
    kernels, prepared, heaps = VARIABLES
    os.environ.setdefault(kernels, str(KERNELS))
    os.environ.setdefault(prepared, str(PREPARED))
    if (library := _glibc()) is not None and heaps not in os.environ:
        library.mallopt(_M_ARENA_MAX, HEAPS)


class Tidy:
    """Gives freed memory back to the system, not more often than every `REST` seconds; every `WHOLE` cycles too."""

    def __init__(self) -> None:
        self._last = 0.0
        self._collected = time.monotonic()
        self._mutex = threading.Lock()

    def __call__(self) -> None:
        """Give back what is free, unless that was done just now."""
        library = _glibc()
        if not self._mutex.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._collected >= WHOLE:
                gc.collect()
                self._collected = time.monotonic()
            if library is not None and time.monotonic() - self._last >= REST:
                library.malloc_trim(0)
                self._last = time.monotonic()
        finally:
            self._mutex.release()
