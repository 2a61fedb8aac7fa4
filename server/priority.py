"""Keeps the event loop from waiting for the model's work: priorities, the interpreter's lock, garbage collection.

On a machine whose processors are all busy with the model, the event loop would otherwise wait for its share of them,
and every read with it. Only Linux gives single threads a priority; elsewhere nothing is changed.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import suppress

from editors.constants import limit

BEHIND = limit(
    10,
    "steps of niceness (19 is the lowest priority) by which a thread that works on the model stands behind the others",
    "the time of reads while the model works: one run each of 14 s with 100 clients on two busy cores, "
    "median read 14 ms, and 23 ms with 0 steps",
)
SWITCH_SECONDS = limit(
    0.001,
    "seconds a thread may hold the interpreter's lock while another waits for it",
    "the time of reads while the model works: Python's own 5 ms add up, for a request takes the lock a "
    "dozen times, each time from a thread that computes",
)

COLLECTIONS = limit(
    (5_000, 4, 250),
    "objects made and kept between two garbage collections of the youngest, youngest between two of the middle, middle "
    "between two of all",
    "the time of reads: with 100 clients Python's own (700, 10, 10) looks through all 150,000 objects "
    "of their connections every 4 s; that takes 150 ms, in which no read is answered",
)


def give_way() -> None:
    """Lower the priority of the calling thread, and of the threads it will start, for the rest of their lives.

    The threads in which torch computes are started by the one that calls it, so they stand behind too.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError):  # a sandbox may forbid it: then reads are slower on a busy machine
        usual = os.getpriority(os.PRIO_PROCESS, os.getpid())  # of the first thread, the event loop
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(usual + BEHIND, 19))


def switch_often() -> None:
    """Let the interpreter change between threads often enough for requests of milliseconds."""
    sys.setswitchinterval(SWITCH_SECONDS)


def keep_what_is_loaded() -> None:
    """Leave the objects that are there now out of every later garbage collection.

    A model and its libraries are about a million objects that stay. Python looks through all of them again and again
    as requests come and go, and nothing else runs for half a second each time. What comes later is looked through in
    larger portions than Python does by itself, and all of it seldom.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTIONS)
