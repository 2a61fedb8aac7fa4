"""The progress of one call as a bar that a person can watch: from 0 to 100, always rising, always with words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable

import anyio

log = logging.getLogger("errata.tools")

TOTAL = 100.0
TICK = 0.5
"""Seconds between two progress notifications at least."""
HEARTBEAT = 2.0
"""Longest silence in seconds while few calls wait; see SLOWEST."""
FEW = 10
"""Up to this many calls at once get every change after one tick."""
SHARE = 0.05
"""Seconds between two notifications, for each call beyond FEW. The notifications of a hundred waiting calls would
take as much of the event loop as the reads."""
SLOWEST = 30.0
"""Seconds between two notifications at most, however many calls wait: hosts give up on a request that is silent for a
minute."""
CREEP = 0.002
"""Share of the rest by which the bar moves if nothing is known: the protocol requires every value to rise."""

Send = Callable[[float, float | None, str | None], Awaitable[None]]


class Progress:
    """The latest step of one call. Threads write it, one task of the event loop sends it on: less often where many do.

    A step is any (done, total); the bar shows its share. Work in several phases that each count from zero gets
    what is left of the bar for each new phase.
    """

    _pumping = 0  # calls of this process whose progress is being sent

    def __init__(self, tick: float | None = None, heartbeat: float | None = None) -> None:
        self._tick = TICK if tick is None else tick
        self._heartbeat = HEARTBEAT if heartbeat is None else heartbeat
        self._lock = threading.Lock()
        self._start = 0.0  # of the present phase, on the bar
        self._share = 0.0  # of the present phase
        self._message = "starting"
        self._changed = False
        self._sent = 0.0

    def __call__(self, done: float, total: float, message: str) -> None:
        """Note a step; cheap, from any thread."""
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        with self._lock:
            if share < self._share:
                self._start = self._place()
            self._share, self._message, self._changed = share, message or "working", True

    def _place(self) -> float:
        return self._start + (1 - self._start) * self._share

    async def pump(self, send: Send) -> None:
        """Tell the client until cancelled: 0 at once, then changes and heartbeats, less often where many wait."""
        Progress._pumping += 1
        try:
            await self._pump(send)
        finally:
            Progress._pumping -= 1

    async def _pump(self, send: Send) -> None:
        if not await self._tell(send, 0.0, "starting"):
            return
        last = time.monotonic()
        while True:
            await anyio.sleep(self._tick)
            now = time.monotonic()
            if now - last < min(SLOWEST, SHARE * (Progress._pumping - FEW)):
                continue
            with self._lock:
                due = self._changed or now - last >= self._heartbeat
                place, message, self._changed = self._place(), self._message, False
            if not due:
                continue
            last = now
            least = self._sent + (TOTAL - self._sent) * CREEP
            # The end is kept for the answer itself.
            self._sent = max(round(min(place * TOTAL, TOTAL * 0.99), 1), least)
            if not await self._tell(send, self._sent, message):
                return

    async def finish(self, send: Send) -> None:
        """The last notification, when the answer is there."""
        await self._tell(send, TOTAL, "done")

    async def _tell(self, send: Send, value: float, message: str) -> bool:
        try:
            await send(value, TOTAL, message)
        except Exception:
            log.debug("progress could not be delivered", exc_info=True)
            return False
        return True
