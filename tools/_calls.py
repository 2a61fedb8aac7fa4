"""One request of a client: who asks, its progress, its place in the queue for the model, and its end.

A call ends when its client cancels it or goes away: while it waits it leaves the queue, while it works its
`RequestContext` says so between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from mcp.server.mcpserver import Context

from editors.errors import Cancelled
from server.http.identity import Identity, identity_of
from server.http.presence import Presence, presence_of
from server.request_context import RequestContext
from server.transaction.model_queue import ModelQueue, Ticket
from tools._progress import Progress

LOOK = 1.0
"""Seconds between two reports of a call that waits for the model."""


@asynccontextmanager
async def calling(
    sdk_context: Context[Any, Any], progress: Progress | None = None
) -> AsyncIterator[RequestContext]:
    """The `RequestContext` of a request; its progress reaches the client while the block runs.

    `cancelled` is set when the block is left by cancellation, that is when the client cancels the request or goes
    away. Raises Cancelled when the client of an older protocol is gone, which the SDK does not report.
    """
    progress = progress or Progress()
    ctx = _context(sdk_context, progress)
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.pump, sdk_context.report_progress)
            if (presence := presence_of(_scope(sdk_context))) is not None:
                tasks.start_soon(_end_with, presence, ctx, tasks.cancel_scope)
            try:
                yield ctx
            except Exception as exc:  # kept out of the task group, which would wrap it in a group
                failure = exc
            tasks.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class():
        ctx.cancelled.set()
        raise
    if failure is None and ctx.cancelled.is_set():
        failure = Cancelled("cancelled; the client is gone")
    if failure is not None:
        raise failure
    await progress.finish(sdk_context.report_progress)


async def _end_with(presence: Presence, ctx: RequestContext, scope: anyio.CancelScope) -> None:
    await presence.gone()
    ctx.cancelled.set()
    scope.cancel()


@asynccontextmanager
async def its_turn(queue: ModelQueue, ctx: RequestContext) -> AsyncIterator[Ticket]:
    """Wait for a turn at the model without a thread. A turn that was not begun is given back at the end of the block.

    Raises Busy when the queue is full.
    """
    loop, called = asyncio.get_running_loop(), asyncio.Event()

    def call() -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is stopping
            loop.call_soon_threadsafe(called.set)

    ticket = queue.take(call)
    try:
        while not called.is_set():
            with anyio.move_on_after(LOOK):
                await called.wait()
            if not called.is_set():
                ctx.progress(0, 1, f"waiting for the model: {queue.before(ticket)} calls before this one")
        yield ticket
    finally:
        queue.withdraw(ticket)


def _context(sdk_context: Context[Any, Any], progress: Progress) -> RequestContext:
    params = sdk_context.session.client_params
    info = params.client_info if params else None
    identity = caller(sdk_context)
    return RequestContext(
        client=info.name if info else None,
        client_version=info.version if info else None,
        request_id=sdk_context.request_id,
        identity=identity.name if identity else None,
        progress=progress,
    )


def caller(sdk_context: Context[Any, Any]) -> Identity | None:
    """Who makes the request, as its token proves; None where no token is asked for."""
    return identity_of(_scope(sdk_context))


def _scope(sdk_context: Context[Any, Any]) -> Any:
    request = getattr(sdk_context.request_context, "request", None)
    return getattr(request, "scope", None)
