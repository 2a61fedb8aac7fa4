"""Tells clients what changed: updates of resources and of their list, in both eras of the protocol.

Clients of the newest protocol open a stream with `subscriptions/listen`. Earlier ones send `resources/subscribe` and
get notifications of their own; each of them is also notified when the list of resources changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from mcp.server.connection import Connection
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.session import ServerSession
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
)
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    EmptyResult,
    LoggingLevel,
    SubscribeRequestParams,
    SubscriptionsListenRequestParams,
    SubscriptionsListenResult,
    UnsubscribeRequestParams,
)

from server.startup import Startup

if TYPE_CHECKING:
    from server.changes import Changes, Seen  # brings torch along, and clients wait

log = logging.getLogger("errata.changes")

STATUS = "errata://status"
EDIT = "errata://edits/{edit_id}"
JOB = "errata://jobs/{job_id}"
PROPOSAL = "errata://proposals/{proposal_id}"

PAUSE = 0.1
"""Seconds between two rounds: a resource that changes many times in one round is sent once."""
MOST_SUBSCRIPTIONS = 1_000
"""Resources that one connection of the earlier protocols can subscribe to."""


@dataclass(eq=False)
class Peer:
    """One connection of the earlier protocols."""

    session: ServerSession
    uris: set[str] = field(default_factory=set)
    level: LoggingLevel | None = None
    pending: dict[ServerEvent, None] = field(default_factory=dict)
    sending: bool = False

    def wants(self, event: ServerEvent) -> bool:
        return event.uri in self.uris if isinstance(event, ResourceUpdated) else True


class Subscriptions:
    """Who is subscribed to changes, and the task that notifies them."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self._bus = InMemorySubscriptionBus()
        self._listen = ListenHandler(self._bus)
        self._peers: dict[int, Peer] = {}
        self._turn = anyio.Lock()
        self._state: str = "loading"
        self._seen: Seen | None = None

    @property
    def peers(self) -> list[Peer]:
        """The connections of the earlier protocols."""
        return list(self._peers.values())

    def peer(self, session: ServerSession) -> Peer:
        """The connection behind a session; it is forgotten when it ends."""
        # The SDK gives handlers no public way to the connection, which alone lives as long as the client stays.
        connection: Connection = session._connection
        key = id(connection)
        if key not in self._peers:
            self._peers[key] = Peer(session)
            connection.exit_stack.callback(self._peers.pop, key, None)
        return self._peers[key]

    # --- what clients ask for ------------------------------------------------------------------

    async def subscribe(
        self, ctx: ServerRequestContext[Any, Any], params: SubscribeRequestParams
    ) -> EmptyResult:
        """`resources/subscribe`. A subscription to a resource that does not exist is kept: it may be made later."""
        uris = self.peer(ctx.session).uris
        if len(uris) >= MOST_SUBSCRIPTIONS:
            raise MCPError(
                INVALID_PARAMS,
                f"this connection has {MOST_SUBSCRIPTIONS:,} subscriptions, the most there can be; unsubscribe first",
            )
        uris.add(params.uri)
        return EmptyResult()

    async def unsubscribe(
        self, ctx: ServerRequestContext[Any, Any], params: UnsubscribeRequestParams
    ) -> EmptyResult:
        """`resources/unsubscribe`; without a subscription nothing happens."""
        self.peer(ctx.session).uris.discard(params.uri)
        return EmptyResult()

    async def listen(
        self, ctx: ServerRequestContext[Any, Any], params: SubscriptionsListenRequestParams
    ) -> SubscriptionsListenResult:
        """`subscriptions/listen`. The acknowledgement leaves out what never changes: tools and prompts."""
        never = {"tools_list_changed": None, "prompts_list_changed": None}
        wanted = params.notifications.model_copy(update=never)
        return await self._listen(ctx, params.model_copy(update={"notifications": wanted}))

    async def middleware(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        """Notes who connects, and announces in `initialize` and `server/discover` the notifications that are really
        sent."""
        result = await call_next(ctx)
        if ctx.method == "notifications/initialized":
            self.peer(ctx.session)
        elif ctx.method in ("initialize", "server/discover") and isinstance(result, dict):
            capabilities = result["capabilities"]
            for name, changes in (("resources", True), ("tools", False), ("prompts", False)):
                if name in capabilities:
                    capabilities[name]["listChanged"] = changes
        return result

    # --- the task that tells them --------------------------------------------------------------

    async def run(self) -> None:
        """Tell clients of changes until cancelled. Of several such tasks one works at a time."""
        async with self._turn:
            with self._waking() as wake:
                async with anyio.create_task_group() as tasks:
                    while True:
                        for event in await self._news():
                            await self._publish(event, tasks)
                        await anyio.sleep(PAUSE)
                        await wake.wait()
                        wake.clear()

    async def _news(self) -> list[ServerEvent]:
        """What to notify clients of. A ledger that cannot be read does not end the task: tools say what is wrong
        with it."""
        services, state = self._startup.ready(), self._startup.state
        before, self._state = self._state, state
        events: list[ServerEvent] = [] if state == before else [ResourceUpdated(STATUS)]
        if services is None:
            return events
        try:
            self._seen, changes = await anyio.to_thread.run_sync(services.look, self._seen)
        except Exception:
            log.warning("what changed could not be read", exc_info=True)
            return events
        return list(dict.fromkeys([*events, *_events(changes)]))

    def close(self) -> None:
        """End all streams of the newest protocol in good order."""
        self._listen.close()

    @contextmanager
    def _waking(self) -> Iterator[asyncio.Event]:
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake.set)

        forget = self._startup.on_change(changed)
        try:
            yield wake
        finally:
            forget()

    async def _publish(self, event: ServerEvent, tasks: TaskGroup) -> None:
        await self._bus.publish(event)
        for peer in self.peers:
            if peer.wants(event):
                peer.pending[event] = None
                if not peer.sending:
                    peer.sending = True
                    tasks.start_soon(_send, peer)


async def _send(peer: Peer) -> None:
    """Send what is pending. A client that does not read keeps this task waiting, and nobody else."""
    try:
        while peer.pending:
            event = next(iter(peer.pending))
            del peer.pending[event]
            if isinstance(event, ResourceUpdated):
                await peer.session.send_resource_updated(event.uri)
            else:
                await peer.session.send_resource_list_changed()
    finally:
        peer.sending = False


def _events(changes: Changes) -> Iterator[ServerEvent]:
    if changes.edits_listed:
        yield ResourcesListChanged()
    if changes.status:
        yield ResourceUpdated(STATUS)
    yield from (ResourceUpdated(EDIT.format(edit_id=edit)) for edit in changes.edits)
    yield from (ResourceUpdated(JOB.format(job_id=job)) for job in changes.jobs)
    yield from (ResourceUpdated(PROPOSAL.format(proposal_id=each)) for each in changes.proposals)
