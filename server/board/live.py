"""Server-sent events: pages hear that something changed, and fetch themselves anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

from server.board.source import Source

PAUSE = 0.2
"""Seconds between two messages: what changes many times in between is told once."""
BEAT = 15.0
"""Seconds after which a silent stream says that it is still there."""
MOST = 200
"""Pages that listen at once."""


class Live:
    """The streams of all pages."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: set[asyncio.Event] = set()
        self._ended = False

    def close(self) -> None:
        """End all streams, so that the server can stop. Call it in the event loop."""
        self._ended = True
        for wake in tuple(self._open):
            wake.set()

    @property
    def full(self) -> bool:
        """True when no more pages can listen."""
        return len(self._open) >= MOST

    async def stream(self) -> AsyncIterator[str]:
        """One message now, one after each change, and a comment where nothing changes for long."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake.set)

        forget = self._source.on_change(changed)
        self._open.add(wake)
        try:
            yield f"retry: 2000\n{self._message()}"
            while not self._ended:
                try:
                    await asyncio.wait_for(wake.wait(), BEAT)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                await asyncio.sleep(PAUSE)
                wake.clear()
                if not self._ended:
                    yield self._message()
        finally:
            self._open.discard(wake)
            forget()

    def _message(self) -> str:
        ledger = self._source.ledger()
        try:
            event = ledger.newest_event() if ledger is not None else 0
        except Exception:  # being replaced by a restore; the next change tells
            event = 0
        return f"event: changed\ndata: {json.dumps({'state': self._source.state, 'event': event})}\n\n"
