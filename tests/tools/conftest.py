"""Clients in both eras of the protocol, talking to the real server in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.server.mcpserver import MCPServer

from editors.edit import Edit
from errata import build
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import Opener, Startup, open_services
from tests import device
from tests.families import save_to
from tests.tools.clients import Connect


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["auto", "legacy"])
def mode(request: pytest.FixtureRequest) -> str:
    """The era the client opens with: the newest protocol, or the handshake of the earlier ones."""
    return str(request.param)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a directory."""
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def settings_of(model_dir: Path, home: Path) -> Settings:
    return Settings(model=str(model_dir), home=home, threads=1, device=device.chosen, dtype="float32")


@pytest.fixture
def settings(tmp_path: Path, model_dir: Path) -> Settings:
    return settings_of(model_dir, tmp_path / "home")


@dataclass(frozen=True)
class Workplace:
    server: MCPServer[Any]
    services: Services


@pytest.fixture(scope="session")
def workplace(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """One server for all tests that change nothing: e1 is active, e2 was made and reverted."""
    settings = settings_of(model_dir, tmp_path_factory.mktemp("workplace"))
    startup = Startup(settings)
    startup.begin()
    services = anyio.run(startup.services, RequestContext())
    services.edits.apply([Edit(subject="France", prompt="The capital of {} is", target="Rome")])
    services.edits.apply([Edit(subject="Japan", prompt="The capital of {} is", target="Paris")])
    services.edits.revert(["e2"])
    yield Workplace(build(settings, startup), services)
    startup.close(30)


@pytest.fixture
async def client(workplace: Workplace, mode: str) -> AsyncIterator[Client]:
    """A client of the shared server. Leave it as it is: `unchanged` looks."""
    async with Client(workplace.server, mode=mode) as connected:
        yield connected


@pytest.fixture
def unchanged(workplace: Workplace) -> Iterator[None]:
    """Fails the test when it leaves a trace in the weights or on the ledger."""
    before = trace(workplace.services)
    yield
    assert trace(workplace.services) == before


def trace(services: Services) -> tuple[Any, ...]:
    """Everything a mistake could have changed."""
    counts = services.history.query("SELECT (SELECT count(*) FROM edits), (SELECT max(seq) FROM events)")
    return (
        services.workspace.host.rehash(),
        services.status().weights_hash,
        counts.rows,
        services.history.list_edits().edits,
    )


@pytest.fixture
def connect(settings: Settings, mode: str) -> Connect:
    """Connect a client to a new server: `async with connect(opener=..., read_only=True) as client`."""

    @asynccontextmanager
    async def connected(opener: Opener = open_services, **changed: Any) -> AsyncIterator[Client]:
        chosen = settings.model_copy(update=changed)
        startup = Startup(chosen, opener)
        try:
            async with Client(build(chosen, startup), mode=mode) as client:
                yield client
        finally:
            startup.close(30)

    return connected
