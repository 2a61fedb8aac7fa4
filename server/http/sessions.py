"""Sessions of the earlier protocols over HTTP: a dropped stream resumes, and a cancelled call gets no answer.

The newest protocol has neither: there a call ends with its connection, and its subscriptions are opened again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http import (
    MCP_SESSION_ID_HEADER,
    EventCallback,
    EventId,
    EventMessage,
    EventStore,
    StreamableHTTPServerTransport,
    StreamId,
)
from mcp.server.streamable_http_manager import StreamableHTTPASGIApp, StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCNotification, JSONRPCResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

KEPT_EVENTS = 256
"""Events kept of one stream; of its progress only the latest."""
KEPT_ANSWERED = 16
"""Streams kept after their answer, for a client that lost its connection while the answer was on the way."""
KEPT_BYTES = 2 * 2**20
"""Bytes of those answers; the newest is kept however long it is."""


@dataclass
class _SessionStream:
    """What was sent on one stream: the answer to a request, or messages of the server's own."""

    number: int
    events: deque[tuple[int, JSONRPCMessage]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    ended: bool = False
    size: int = 0

    def add(self, number: int, message: JSONRPCMessage) -> None:
        if _is_progress(message):
            for old in [event for event in self.events if _is_progress(event[1])]:
                self.events.remove(old)
        self.events.append((number, message))


class Events(EventStore):
    """The latest events of one session, in memory: they end with the session, and sessions end with the server."""

    def __init__(self) -> None:
        self._streams: dict[StreamId, _SessionStream] = {}  # the oldest first
        self._last_event = self._last_stream = 0

    def is_open(self, stream_id: StreamId) -> bool:
        """True for a stream that was not ended yet."""
        return stream_id in self._streams and not self._streams[stream_id].ended

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Keep a message; None only marks the beginning. Returns the id to resume after."""
        if not self.is_open(stream_id):
            self._last_stream += 1
            self._streams.pop(stream_id, None)
            self._streams[stream_id] = _SessionStream(self._last_stream)
        stream = self._streams[stream_id]
        self._last_event += 1
        event_id = f"{stream.number}-{self._last_event}"
        if message is not None:
            stream.add(self._last_event, message)
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            stream.size = len(message.model_dump_json())
            self.end(stream_id)
        return event_id

    def end(self, stream_id: StreamId) -> None:
        """End a stream: nothing more will come on it."""
        if stream_id in self._streams:
            self._streams[stream_id].ended = True
        ended = [(name, stream) for name, stream in self._streams.items() if stream.ended]
        size = sum(stream.size for _, stream in ended)
        while len(ended) > KEPT_ANSWERED or (len(ended) > 1 and size > KEPT_BYTES):
            name, stream = ended.pop(0)
            size -= stream.size
            del self._streams[name]

    def is_over(self, last_event_id: EventId) -> bool:
        """True when nothing came after an event, and nothing can."""
        found = self._find(last_event_id)
        if found is None:
            return True
        stream_id, last = found
        stream = self._streams[stream_id]
        return stream.ended and not any(number > last for number, _ in stream.events)

    async def replay_events_after(
        self, last_event_id: EventId, send_callback: EventCallback
    ) -> StreamId | None:
        """Send what came after an event; returns the stream if more can come on it."""
        found = self._find(last_event_id)
        if found is None:
            return None
        stream_id, last = found
        stream = self._streams[stream_id]
        # Sending lets others run, and they may add to the stream: look again until nothing is left.
        while later := [kept for kept in stream.events if kept[0] > last]:
            last, message = later[0]
            await send_callback(EventMessage(message, f"{stream.number}-{last}"))
        return None if stream.ended else stream_id

    def _find(self, event_id: EventId) -> tuple[StreamId, int] | None:
        """The stream of an event, and the event's number; None where the stream is not kept."""
        number, _, event = event_id.partition("-")
        if not (event.isascii() and event.isdecimal() and len(event) < 20):
            return None
        for stream_id, stream in self._streams.items():
            if str(stream.number) == number:
                return stream_id, int(event)
        return None


class Transport(StreamableHTTPServerTransport):
    """One session."""

    def __init__(self, events: Events, **options: Any) -> None:
        super().__init__(event_store=events, **options)
        self._events = events

    async def _terminate_unanswered_request(self, request_id: str | int) -> None:
        # The SDK answers a cancelled call with an error here, to end its stream. The specification says that
        # such a call is not answered, so the stream just ends; nor is there anything to resume.
        self._events.end(str(request_id))
        self.close_sse_stream(str(request_id))

    async def _mint_priming_event(self, stream_id: StreamId, protocol_version: str) -> dict[str, Any] | None:
        # A client that resumes has an event to resume after. Sending it another one takes a moment, in which
        # a message could get lost between what is replayed and what is sent live.
        if self._events.is_open(stream_id):
            return None
        return await super()._mint_priming_event(stream_id, protocol_version)

    async def _replay_events(self, last_event_id: str, request: Request, send: Send) -> None:
        # An empty stream would be taken for one that dropped, and the client would ask for it again every second for
        # as long as its session lasts. "No content" tells whoever reads server-sent events not to come back.
        if self._events.is_over(last_event_id):
            headers = {MCP_SESSION_ID_HEADER: self.mcp_session_id} if self.mcp_session_id else {}
            await Response(status_code=204, headers=headers)(request.scope, request.receive, send)
            return
        await super()._replay_events(last_event_id, request, send)


class Sessions(StreamableHTTPSessionManager):
    """All sessions. Each has its own events, so that none can be resumed from another."""

    def _admit_session(self, requestor: AuthorizationContext | None) -> StreamableHTTPServerTransport | None:
        plain = super()._admit_session(requestor)
        if plain is None:
            return None
        session_id = plain.mcp_session_id
        assert session_id is not None
        transport = Transport(
            Events(),
            mcp_session_id=session_id,
            is_json_response_enabled=self.json_response,
            security_settings=self.security_settings,
            retry_interval=self.retry_interval,
            idle_timeout=self.session_idle_timeout,
        )
        self._server_instances[session_id] = transport
        return transport


def app(server: Server[Any], security: TransportSecuritySettings) -> Starlette:
    """The ASGI application that serves MCP at /mcp, in every era of the protocol."""
    sessions = Sessions(server, security_settings=security)
    return Starlette(
        routes=[Route("/mcp", StreamableHTTPASGIApp(sessions))], lifespan=lambda _: sessions.run()
    )


def _is_progress(message: JSONRPCMessage) -> bool:
    return isinstance(message, JSONRPCNotification) and message.method == "notifications/progress"
