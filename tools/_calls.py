"""One request of a client as a `Call`: who asks, progress from worker threads, cancellation."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from mcp.server.mcpserver import Context

from server.request_context import RequestContext

log = logging.getLogger("errata.tools")

TICK = 0.5
"""Seconds between two progress notifications at least."""
HEARTBEAT = 2.0
"""Seconds of silence at most; hosts give up on a silent request after a minute."""

Send = Callable[[float, float | None, str | None], Awaitable[None]]


class Progress:
    """The latest step of one call. Threads write it, one task of the event loop sends it on.

    The protocol wants every notification's value greater than the one before; heartbeats and
    phases that count from zero again therefore move on by `_STEP`.
    """

    _STEP = 1e-3

    def __init__(self, tick: float = TICK, heartbeat: float = HEARTBEAT) -> None:
        self._tick, self._heartbeat = tick, heartbeat
        self._lock = threading.Lock()
        self._latest: tuple[float, float, str] = (0.0, 0.0, "working")
        self._changed = False
        self._sent = 0.0

    def __call__(self, done: float, total: float, message: str) -> None:
        """Note a step; cheap, from any thread."""
        with self._lock:
            self._latest, self._changed = (done, total, message), True

    async def pump(self, send: Send) -> None:
        """Tell the client until cancelled: a change after at most a tick, else a heartbeat."""
        last = time.monotonic()
        while True:
            await anyio.sleep(self._tick)
            now = time.monotonic()
            with self._lock:
                due = self._changed or now - last >= self._heartbeat
                (done, total, message), self._changed = self._latest, False
            if due:
                last = now
                self._sent = max(done, self._sent + self._STEP)
                try:
                    await send(self._sent, total if total >= self._sent else None, message)
                except Exception:
                    log.debug("progress could not be delivered", exc_info=True)
                    return


@asynccontextmanager
async def calling(
    sdk_context: Context[Any, Any], progress: Progress | None = None
) -> AsyncIterator[RequestContext]:
    """A `Call` for the request behind `ctx`; its progress reaches the client while the block runs.

    `cancelled` is set when the block is left by cancellation, that is when the client cancels
    the request or goes away.
    """
    progress = progress or Progress()
    ctx = _call(sdk_context, progress)
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.pump, sdk_context.report_progress)
            try:
                yield ctx
            except Exception as exc:  # kept out of the task group, which would wrap it in a group
                failure = exc
            tasks.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class():
        ctx.cancelled.set()
        raise
    if failure is not None:
        raise failure


def _call(sdk_context: Context[Any, Any], progress: Progress) -> RequestContext:
    params = sdk_context.session.client_params
    info = params.client_info if params else None
    return RequestContext(
        client=info.name if info else None,
        client_version=info.version if info else None,
        request_id=sdk_context.request_id,
        progress=progress,
    )
