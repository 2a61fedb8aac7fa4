"""HTTP sessions of the earlier protocols: a dropped stream resumes, and a cancelled call gets no answer."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2 as httpx
import pytest
import uvicorn
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client
from mcp.client import streamable_http
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ResourceUpdated
from mcp.server.streamable_http import EventMessage
from mcp_types import JSONRPCMessage, JSONRPCNotification, JSONRPCResponse, ResourceUpdatedNotification

from errata import build, http_app
from server.http.sessions import KEPT_ANSWERED, Events
from server.services import Services
from server.settings import Settings
from server.startup import Report, Startup
from tests.tools.clients import told
from tests.tools.doubles import Slow

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::mcp.MCPDeprecationWarning")]

ACCEPT = {"accept": "application/json, text/event-stream"}
VERSION = "2025-11-25"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def reached(event: threading.Event) -> None:
    """Wait for something a worker thread does."""
    with anyio.fail_after(30):
        assert await anyio.to_thread.run_sync(event.wait, 25)


@asynccontextmanager
async def serving(slow: Slow, home: Path) -> AsyncIterator[int]:
    """The real HTTP server over slow services; gives its port."""
    settings = Settings(home=home, model="unused", transport="http")
    app = http_app(build(settings, Startup(settings, slow.open)), settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        web = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(web.serve, [listener])
            while not web.started:
                await anyio.sleep(0.01)
            yield listener.getsockname()[1]
            slow.release.set()
            web.should_exit = True


class Raw:
    """A session spoken to by hand, to see what a well-behaved client hides."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http, self.headers = http, dict(ACCEPT)

    @classmethod
    @asynccontextmanager
    async def opened(cls, port: int) -> AsyncIterator[Raw]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            raw = cls(http)
            hello = {
                "protocolVersion": VERSION,
                "capabilities": {},
                "clientInfo": {"name": "t", "version": "1"},
            }
            answer = await raw.post("initialize", hello, 0)
            raw.headers |= {
                "mcp-session-id": answer.headers["mcp-session-id"],
                "mcp-protocol-version": VERSION,
            }
            await raw.post("notifications/initialized")
            yield raw

    async def post(self, method: str, params: Any = None, number: int | None = None) -> httpx.Response:
        return await self.http.post("/mcp", json=_message(method, params, number), headers=self.headers)

    def ask(self, number: int) -> Any:
        """The stream of a call of ask_model."""
        params = {"name": "ask_model", "arguments": {"prompt": "hello"}, "_meta": {"progressToken": "p"}}
        return self.http.stream(
            "POST", "/mcp", json=_message("tools/call", params, number), headers=self.headers
        )

    def resume(self, event: str) -> Any:
        return self.http.stream("GET", "/mcp", headers=self.headers | {"last-event-id": event})


def _message(method: str, params: Any, number: int | None) -> dict[str, Any]:
    values = {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
    return {name: value for name, value in values.items() if value is not None}


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    """The id and the message of each event; None for one without a message."""
    last = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            last = value
        elif name.startswith("data"):
            yield last, json.loads(value) if value else None


async def test_a_cancelled_call_is_not_answered(tmp_path: Path) -> None:
    slow = Slow()
    async with serving(slow, tmp_path) as port, Raw.opened(port) as raw:
        seen, first = [], ""
        with anyio.fail_after(30):
            async with raw.ask(7) as response:
                async for event, message in events_of(response):
                    if not first:
                        first = event
                        await reached(slow.entered)
                        cancelled = {"requestId": 7, "reason": "changed my mind"}
                        await raw.post("notifications/cancelled", cancelled)
                    seen.append(message)
            # The stream has ended. Who resumes it gets the rest, then is told not to come back.
            async with raw.resume(first) as response:
                rest = [event async for event in events_of(response)]
            seen += [message for _, message in rest]
            async with raw.resume(rest[-1][0] if rest else first) as response:
                assert response.status_code == 204
        await reached(slow.left)
        assert not [message for message in seen if message and "id" in message]
        assert (await raw.post("ping", {}, 8)).status_code == 200


async def test_a_call_whose_stream_dropped_goes_on_and_is_answered_on_another(tmp_path: Path) -> None:
    slow = Slow()
    async with serving(slow, tmp_path) as port, Raw.opened(port) as raw:
        with anyio.fail_after(30):
            async with raw.ask(7) as response:
                async for event, message in events_of(response):
                    last = event
                    if message:  # some progress
                        break
            assert slow.ctx is not None
            assert not slow.ctx.cancelled.is_set()
            slow.release.set()
            await reached(slow.left)
            async with raw.resume(last) as response:
                messages = [message async for _, message in events_of(response)]
        assert messages[-1]["id"] == 7
        assert messages[-1]["result"]["structuredContent"]["completion"] == "hello"
        assert [message for message in messages if "id" in message] == messages[-1:]


async def test_no_session_can_resume_the_stream_of_another(tmp_path: Path) -> None:
    slow = Slow()
    async with serving(slow, tmp_path) as port, Raw.opened(port) as raw, Raw.opened(port) as other:
        with anyio.fail_after(30):
            async with raw.ask(7) as response:
                last, _ = await anext(events_of(response))
            slow.release.set()
            await reached(slow.left)
            async with other.resume(last) as response:
                assert response.status_code == 204
                assert [event async for event in events_of(response)] == []


@pytest.mark.parametrize("event", ["1", "-", "99-1", "1-x", "1-" + "9" * 5000, "²-1", "no"])
async def test_an_event_that_never_was_resumes_nothing(tmp_path: Path, event: str) -> None:
    async with serving(Slow(), tmp_path) as port, Raw.opened(port) as raw:
        headers = [(k.encode(), v.encode()) for k, v in (raw.headers | {"last-event-id": event}).items()]
        async with raw.http.stream("GET", "/mcp", headers=headers) as response:
            with anyio.fail_after(10):
                assert response.status_code == 204
                assert [each async for each in events_of(response)] == []


async def test_a_client_that_cancels_calls_leaves_no_requests_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real client takes a stream that ends without an answer for one that dropped, and resumes it."""
    monkeypatch.setattr(streamable_http, "DEFAULT_RECONNECTION_DELAY_MS", 5)
    slow, resumed, calls = Slow(), list[str](), 5

    async def note(request: httpx.Request) -> None:
        resumed.extend(filter(None, [request.headers.get("last-event-id")]))

    async with (
        serving(slow, tmp_path) as port,
        httpx.AsyncClient(timeout=60, event_hooks={"request": [note]}) as http,
        Client(
            streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http), mode="legacy"
        ) as client,
    ):
        for _ in range(calls):
            slow.entered.clear()
            slow.left.clear()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.call_tool, "ask_model", {"prompt": "hello"})
                await reached(slow.entered)
                tasks.cancel_scope.cancel()
            await reached(slow.left)
        most = 2 * streamable_http.MAX_RECONNECTION_ATTEMPTS * calls  # the rest of each stream, then its end
        for _ in range(50):  # in which an endless client would come back some hundred times
            await anyio.sleep(0.01)
        assert 0 < len(resumed) <= most
        so_far = len(resumed)
        await anyio.sleep(0.1)
        assert len(resumed) == so_far


async def test_a_real_client_gets_its_answer_though_its_connection_was_cut(tmp_path: Path) -> None:
    slow, cut = Slow(), anyio.Event()

    async def progress(*_: Any) -> None:
        cut.set()

    async with (
        serving(slow, tmp_path) as port,
        cutting(port, cut) as (proxy, was_cut),
        Client(f"http://127.0.0.1:{proxy}/mcp", mode="legacy") as client,
    ):
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:

                async def release() -> None:
                    await was_cut.wait()
                    slow.release.set()

                tasks.start_soon(release)
                result = await client.call_tool("ask_model", {"prompt": "hello"}, progress_callback=progress)
        assert was_cut.is_set()
        assert result.structured_content
        assert result.structured_content["completion"] == "hello"
        assert (await told(client, "model_status"))["state"] == "ready"


class Gated(Slow):
    """Services that open when they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_open = threading.Event()

    def open(self, settings: Settings, report: Report) -> Services:
        assert self.may_open.wait(30)
        return super().open(settings, report)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_hears_over_http_that_the_model_is_ready(tmp_path: Path, mode: str) -> None:
    gated, ready = Gated(), anyio.Event()

    async def hear(message: object) -> None:
        if isinstance(message, ResourceUpdatedNotification) and str(message.params.uri) == "errata://status":
            ready.set()

    async with (
        serving(gated, tmp_path) as port,
        Client(f"http://127.0.0.1:{port}/mcp", mode=mode, message_handler=hear) as client,
    ):
        with anyio.fail_after(60):
            if mode == "legacy":
                await client.subscribe_resource("errata://status")
                gated.may_open.set()
                await ready.wait()
            else:
                async with client.listen(resource_subscriptions=["errata://status"]) as stream:
                    gated.may_open.set()
                    assert await anext(stream) == ResourceUpdated("errata://status")
        assert (await told(client, "model_status"))["state"] == "ready"


@asynccontextmanager
async def cutting(port: int, cut: anyio.Event) -> AsyncIterator[tuple[int, anyio.Event]]:
    """A proxy that drops every connection that is open when `cut` is set; gives its port and when it did so."""
    done = anyio.Event()
    open_now: set[SocketStream] = set()

    async def forward(source: SocketStream, target: SocketStream) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                await target.send(data)
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await target.aclose()

    async def connection(client: SocketStream) -> None:
        server = await anyio.connect_tcp("127.0.0.1", port)
        open_now.update((client, server))
        async with server, client, anyio.create_task_group() as both:
            both.start_soon(forward, client, server)
            both.start_soon(forward, server, client)
        open_now.difference_update((client, server))

    async def cutter() -> None:
        await cut.wait()
        for stream in list(open_now):
            await stream.aclose()
        done.set()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, connection)
        tasks.start_soon(cutter)
        yield listener.extra(SocketAttribute.local_port), done
        tasks.cancel_scope.cancel()


def _note(method: str) -> JSONRPCMessage:
    return JSONRPCNotification(jsonrpc="2.0", method=method)


def _answer(number: int, text: str = "") -> JSONRPCMessage:
    return JSONRPCResponse(jsonrpc="2.0", id=number, result={"text": text})


async def replayed(events: Events, last: str) -> tuple[list[JSONRPCMessage], str | None]:
    sent: list[EventMessage] = []

    async def send(message: EventMessage) -> None:
        sent.append(message)

    stream = await events.replay_events_after(last, send)
    return [each.message for each in sent], stream


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=40), st.integers(0, 999)
)
async def test_what_is_resumed_is_the_rest_of_that_stream_in_order(
    steps: list[tuple[str, bool]], choice: int
) -> None:
    events = Events()
    stored: list[tuple[str, JSONRPCMessage, str]] = []
    answered: set[str] = set()
    for number, (stream, final) in enumerate(steps):
        if stream not in answered:  # nothing comes after an answer
            message = _answer(number) if final else _note(f"n{number}")
            stored.append((stream, message, await events.store_event(stream, message)))
            answered |= {stream} if final else set()
    dropped = choice % len(stored)
    stream, _, last = stored[dropped]
    messages, goes_on = await replayed(events, last)
    assert messages == [message for name, message, _ in stored[dropped + 1 :] if name == stream]
    assert goes_on == (None if stream in answered else stream)


async def test_only_the_latest_progress_is_kept_and_old_answers_are_forgotten() -> None:
    events = Events()
    first = await events.store_event("1", None)
    for _ in range(1000):
        await events.store_event("1", _note("notifications/progress"))
    assert len((await replayed(events, first))[0]) == 1
    await events.store_event("1", _answer(1))
    for number in range(2, KEPT_ANSWERED + 2):
        await events.store_event(str(number), _answer(number))
    assert await replayed(events, first) == ([], None)
    large = await events.store_event("large", None)
    await events.store_event("large", _answer(99, "x" * 3 * 2**20))
    assert len((await replayed(events, large))[0]) == 1
