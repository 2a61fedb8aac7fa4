"""Over real HTTP: work stops when its client is gone, and half a request does not hold a connection."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx2 as httpx
import pytest
import uvicorn

from errata import build, http_app
from server.http import connections, presence
from server.http.connections import ImpatientProtocol
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import Startup
from tests import device
from tests.families import save_to

pytestmark = pytest.mark.anyio

ACCEPT = {"accept": "application/json, text/event-stream"}
MODERN = "2026-07-28"
LEGACY = "2025-11-25"
INFO = {"name": "t", "version": "1"}
LONG = {"prompt": "Oslo", "max_new_tokens": 400}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def serving(home: Path, model: Path) -> AsyncIterator[tuple[int, Services]]:
    """The real HTTP server with a tiny model; gives its port."""
    settings = Settings(
        model=str(model), home=home, threads=1, device=device.chosen, dtype="float32", transport="http"
    )
    startup = Startup(settings)
    app = http_app(build(settings, startup), settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, http=ImpatientProtocol)
        web = uvicorn.Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(web.serve, [listener])
            startup.begin()
            yield listener.getsockname()[1], await startup.services(RequestContext())
            web.should_exit = True
    startup.close(30)


async def legacy(http: httpx.AsyncClient) -> dict[str, str]:
    """The headers of a new session of an earlier protocol."""
    hello = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": INFO}
    message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}
    answer = await http.post("/mcp", json=message, headers=ACCEPT)
    headers = ACCEPT | {
        "mcp-session-id": answer.headers["mcp-session-id"],
        "mcp-protocol-version": LEGACY,
    }
    await http.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=headers)
    return headers


def call(era: str, tool: str, given: dict[str, Any], number: int) -> dict[str, Any]:
    params: dict[str, Any] = {"name": tool, "arguments": given}
    meta: dict[str, Any] = {"progressToken": number}
    if era == MODERN:
        meta |= {
            "io.modelcontextprotocol/protocolVersion": MODERN,
            "io.modelcontextprotocol/clientInfo": INFO,
            "io.modelcontextprotocol/clientCapabilities": {},
        }
    return {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params | {"_meta": meta}}


def headers_of(era: str, tool: str) -> dict[str, str]:
    if era != MODERN:
        return {}
    return ACCEPT | {"mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": tool}


async def until(condition: Any) -> None:
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.01)


async def closed(stream: anyio.abc.ByteReceiveStream) -> bool:
    """Read until the server closes the connection."""
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await stream.receive()
    return True


@pytest.mark.parametrize("era", [MODERN, LEGACY])
async def test_the_work_of_clients_that_leave_stops_and_leaves_the_queue(
    tmp_path: Path, model: Path, era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "PATIENCE", 0.2)
    async with serving(tmp_path, model) as (port, services):
        queue, base = services.workspace.queue, f"http://127.0.0.1:{port}"
        holder = queue.take(lambda: None)
        async with anyio.create_task_group() as tasks, httpx.AsyncClient(base_url=base, timeout=60) as http:
            session = await legacy(http) if era == LEGACY else {}

            async def ask(number: int, tool: str, given: dict[str, Any]) -> None:
                message, headers = call(era, tool, given, number), session | headers_of(era, tool)
                async with http.stream("POST", "/mcp", json=message, headers=headers) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    async for _ in answer.aiter_lines():
                        pass

            for n in range(1, 21):
                tasks.start_soon(ask, n, "ask_model", LONG)
                tasks.start_soon(ask, 100 + n, "audit_edits", {})
            await until(lambda: services.answers.waiting == 20 and queue.waiting == 21)
            tasks.cancel_scope.cancel()
        await until(lambda: services.answers.waiting == 0 and queue.waiting <= 1)
        queue.withdraw(holder)

        # And one that has begun stops as well.
        async with anyio.create_task_group() as tasks, httpx.AsyncClient(base_url=base, timeout=60) as http:
            session = await legacy(http) if era == LEGACY else {}
            tasks.start_soon(ask, 500, "ask_model", LONG)
            await until(lambda: queue._current is not None)
            tasks.cancel_scope.cancel()
        await until(lambda: queue._current is None and services.answers.waiting == 0)


async def test_a_client_that_comes_back_to_its_session_keeps_its_call(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "PATIENCE", 0.3)
    async with serving(tmp_path, model) as (port, services):
        queue = services.workspace.queue
        holder = queue.take(lambda: None)
        base = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base, timeout=60) as http:
            session = await legacy(http)
            message = call(LEGACY, "ask_model", {"prompt": "Oslo", "max_new_tokens": 2}, 5)
            with anyio.move_on_after(10):
                async with http.stream("POST", "/mcp", json=message, headers=session) as answer:
                    event = ""
                    async for line in answer.aiter_lines():
                        if line.startswith("id: "):
                            event = line.removeprefix("id: ")
                        if services.answers.waiting == 1 and event:
                            break
            async with http.stream("GET", "/mcp", headers=session | {"last-event-id": event}) as resumed:
                await anyio.sleep(0.6)  # longer than a client that is gone is waited for
                assert services.answers.waiting == 1
                queue.withdraw(holder)
                with anyio.fail_after(60):
                    async for line in resumed.aiter_lines():
                        if line.startswith("data: ") and "result" in (said := json.loads(line[6:])):
                            assert not said["result"].get("isError")
                            break


async def test_a_connection_that_never_finishes_its_headers_is_closed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    beginnings = [
        b"",
        b"GET /health HT",
        b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",  # half a second request
    ]
    async with serving(tmp_path, model) as (port, _):
        for beginning in beginnings:
            stream = await anyio.connect_tcp("127.0.0.1", port)
            if beginning:
                await stream.send(beginning)
            with anyio.fail_after(10):
                assert await closed(stream)
            await stream.aclose()
        # A call that takes longer than that is not cut off.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            for _ in range(2):
                assert (await http.get("/ready")).json() == {"status": "ready"}
                await anyio.sleep(0.5)
