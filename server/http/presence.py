"""Whether the client of a request is still there.

The newest protocol says that closing the answer's stream cancels the request, and the SDK does that. In the earlier
protocols a stream may break and resume, so a request goes on without it. Here such a request ends when its stream is
closed and its whole session has had no connection for `PATIENCE` seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE = 5.0
"""Seconds a client of an earlier protocol has to come back."""
BODY_SECONDS = 30.0
"""Seconds in which a request's body must arrive."""
_KEY = "errata.presence"


class Presence:
    """The client of one request."""

    def __init__(self, session: _Session | None) -> None:
        self._closed = anyio.Event()
        self._session = session

    def close(self) -> None:
        """The stream of the answer is closed."""
        self._closed.set()

    async def gone(self) -> None:
        """Return when nobody waits for the answer any more."""
        await self._closed.wait()
        if self._session is not None:
            await self._session.empty(PATIENCE)


class _Session:
    """The connections of one session of an earlier protocol."""

    def __init__(self) -> None:
        self.open = 0
        self.changed = anyio.Event()

    def count(self, change: int) -> None:
        self.open += change
        self.changed.set()
        self.changed = anyio.Event()

    async def empty(self, seconds: float) -> None:
        """Return when there has been no connection for so long."""
        while True:
            changed = self.changed
            if self.open:
                await changed.wait()
                continue
            with anyio.move_on_after(seconds) as waiting:
                await changed.wait()
            if waiting.cancelled_caught:
                return


class Watch:
    """ASGI middleware that notes for every request whether its client is there, and drops requests whose body never
    arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._sessions: WeakValueDictionary[str, _Session] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = Headers(scope=scope).get("mcp-session-id")
        session = self._sessions.setdefault(name, _Session()) if name else None
        presence = scope[_KEY] = Presence(session)
        if session is not None:
            session.count(+1)
        try:
            await self._app(scope, self._watched(receive, presence), send)
        finally:
            presence.close()
            if session is not None:
                session.count(-1)

    def _watched(self, receive: Receive, presence: Presence) -> Receive:
        more = True

        async def watched() -> Message:
            nonlocal more
            if not more:
                message = await receive()
            else:
                with anyio.move_on_after(BODY_SECONDS):
                    message = await receive()
                    more = bool(message.get("more_body"))
                    return message
                message = {"type": "http.disconnect"}
            if message["type"] == "http.disconnect":
                presence.close()
            return message

        return watched


def presence_of(scope: Mapping[str, Any] | None) -> Presence | None:
    """Whether the client of the request with this ASGI scope is there; None where that is not known."""
    return None if scope is None else scope.get(_KEY)
