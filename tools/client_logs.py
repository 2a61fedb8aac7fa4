"""The server's log for clients that ask for it.

What is logged during a call goes to the client that called; what is logged in the background (loading, jobs) goes to
every connection that set a level. Earlier protocols set it with `logging/setLevel`, the newest one with each request.
Nothing is sent to a client that did not ask. Tracebacks stay in the server's own log.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

import anyio
from mcp.server.connection import allowed_log_levels
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.session import ServerSession
from mcp_types import (
    EmptyResult,
    LoggingLevel,
    LoggingMessageNotification,
    LoggingMessageNotificationParams,
    RequestId,
    SetLevelRequestParams,
)
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from tools.changes import Subscriptions

LEVELS: tuple[LoggingLevel, ...] = get_args(LoggingLevel)
"""From the least to the most severe."""
LOGGER = "errata"
MOST_WAITING = 1_000
"""Records that wait to be sent; more are dropped."""
PATIENCE = 1.0
"""Seconds a client has to take a record; then it is dropped, so that others get theirs."""


@dataclass(frozen=True)
class Caller:
    """The request that is being served, and the levels its client asked for."""

    session: ServerSession
    request_id: RequestId | None
    wanted: frozenset[LoggingLevel]


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


_Item = tuple[LoggingMessageNotification, Caller | None]


class _Handler(logging.Handler):
    """Puts records on a queue of the event loop, from any thread."""

    def __init__(self, waiting: asyncio.Queue[_Item]) -> None:
        super().__init__(logging.INFO)
        self._loop = asyncio.get_running_loop()
        self._waiting = waiting

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._put, (_message(record), _caller.get()))

    def _put(self, item: _Item) -> None:
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put_nowait(item)


class ClientLogs:
    """Passes the records of Errata's loggers on to clients."""

    def __init__(self, subscriptions: Subscriptions) -> None:
        self._subscriptions = subscriptions
        self._turn = anyio.Lock()
        self._waiting: asyncio.Queue[_Item] | None = None

    async def set_level(
        self, ctx: ServerRequestContext[Any, Any], params: SetLevelRequestParams
    ) -> EmptyResult:
        """`logging/setLevel`."""
        self._subscriptions.peer(ctx.session).level = params.level
        return EmptyResult()

    async def middleware(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        """What is logged during a request, also in the threads it starts, goes to the client that sent it."""
        if ctx.request_id is None or ctx.method == "initialize":
            return await call_next(ctx)
        if ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
            wanted = allowed_log_levels(ctx.protocol_version, ctx.meta)
        else:
            wanted = _from(self._subscriptions.peer(ctx.session).level)
        token = _caller.set(Caller(ctx.session, ctx.request_id, wanted))
        try:
            result = await call_next(ctx)
        finally:
            _caller.reset(token)
        if wanted and self._waiting is not None:
            await asyncio.sleep(0)  # what was logged last is on its way to the queue
            with anyio.move_on_after(PATIENCE):
                await self._waiting.join()  # nothing can be sent for a request that was answered
        return result

    async def run(self) -> None:
        """Send what is logged until cancelled. Of several such tasks one works at a time."""
        async with self._turn:
            waiting: asyncio.Queue[_Item] = asyncio.Queue()
            handler, self._waiting = _Handler(waiting), waiting
            logger = logging.getLogger(LOGGER)
            logger.addHandler(handler)
            if not logger.isEnabledFor(logging.INFO):
                logger.setLevel(logging.INFO)
            try:
                while True:
                    item = await waiting.get()
                    with suppress(Exception):  # a log record about the failure would end up here again
                        await self._send(*item)
                    waiting.task_done()
            finally:
                logger.removeHandler(handler)
                self._waiting = None

    async def _send(self, message: LoggingMessageNotification, caller: Caller | None) -> None:
        level = message.params.level
        with anyio.move_on_after(PATIENCE):
            if caller is not None:
                if level in caller.wanted:
                    await caller.session.send_notification(message, caller.request_id)
                return
        for peer in self._subscriptions.peers:
            if level in _from(peer.level):
                with anyio.move_on_after(PATIENCE):
                    await peer.session.send_notification(message)


def _from(level: LoggingLevel | None) -> frozenset[LoggingLevel]:
    """A level and those above it; none for None."""
    return frozenset() if level is None else frozenset(LEVELS[LEVELS.index(level) :])


def _message(record: logging.LogRecord) -> LoggingMessageNotification:
    level: LoggingLevel = "info"
    for least, name in (
        (logging.WARNING, "warning"),
        (logging.ERROR, "error"),
        (logging.CRITICAL, "critical"),
    ):
        if record.levelno >= least:
            level = name  # type: ignore[assignment]
    return LoggingMessageNotification(
        params=LoggingMessageNotificationParams(level=level, logger=record.name, data=record.getMessage())
    )
