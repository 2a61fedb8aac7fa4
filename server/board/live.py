"""Server-sent events: pages hear that something changed, and fetch themselves anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

from server.board.source import Source

PAUSE = 0.2
"""Seconds between two messages: several changes in between give one message."""
WORKING = 1.0
"""Seconds between two messages while only the progress of jobs, or of loading the model, is new."""
BEAT = 15.0
"""Seconds after which a silent stream says that it is still there."""
MOST = 200
"""Pages that listen at once."""


class Live:
    """The streams of all pages."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._ended = False
        self._changes = 0
        source.on_change(self._changed)

    def close(self) -> None:
        """End all streams, so that the server can stop. Call it in the event loop."""
        self._ended = True
        for wake in tuple(self._open):
            wake.set()

    @property
    def full(self) -> bool:
        """True when no more pages can listen."""
        return len(self._open) >= MOST

    def _changed(self) -> None:
        self._changes += 1
        for wake, loop in tuple(self._open.items()):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake.set)

    async def stream(self) -> AsyncIterator[str]:
        """One message now, one after each change, and a comment where nothing changes for long."""
        wake = asyncio.Event()
        self._open[wake] = asyncio.get_running_loop()
        told, silent = self._now(), 0.0
        try:
            yield f"retry: 2000\n{_message(told)}"
            while not self._ended:
                patience = WORKING if self._source.state == "loading" else BEAT
                try:
                    await asyncio.wait_for(wake.wait(), patience)
                    await asyncio.sleep(PAUSE if self._now()["event"] != told["event"] else WORKING)
                except TimeoutError:
                    silent += patience
                wake.clear()
                if (now := self._now()) != told and not self._ended:
                    told, silent = now, 0.0
                    yield _message(told)
                elif silent >= BEAT and not self._ended:
                    silent = 0.0
                    yield ": still here\n\n"
        finally:
            del self._open[wake]

    def _now(self) -> dict[str, object]:
        ledger = self._source.ledger()
        try:
            event = ledger.newest_event() if ledger is not None else 0
        except Exception:  # being replaced by a restore; the next change sends a message
            event = 0
        source = self._source
        return {"state": source.state, "doing": source.message, "event": event, "change": self._changes}


def _message(now: dict[str, object]) -> str:
    return f"event: changed\ndata: {json.dumps(now)}\n\n"
