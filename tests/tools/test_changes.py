"""Clients hear of what changed: resources, their list, and the server's log if they ask for it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import mcp_types as types
import pytest
from mcp import Client
from mcp.client.subscriptions import ResourcesListChanged, ResourceUpdated, ServerEvent
from mcp.shared.exceptions import MCPError

from errata import ErrataServer, build
from server.settings import Settings
from server.startup import Startup
from tests.tools.clients import told
from tests.tools.doubles import Slow
from tools.changes import MOST_SUBSCRIPTIONS

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::mcp.MCPDeprecationWarning")]

FRANCE = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
STATUS, FIRST = "errata://status", "errata://edits/e1"


@pytest.fixture
def server(settings: Settings) -> Iterator[ErrataServer]:
    startup = Startup(settings)
    yield build(settings, startup)
    startup.close(30)


class Heard:
    """What a client heard, in order."""

    def __init__(self) -> None:
        self.events: list[ServerEvent] = []
        self.logs: list[types.LoggingMessageNotificationParams] = []
        self._news = anyio.Event()

    async def message(self, message: Any) -> None:
        match message:
            case types.ResourceUpdatedNotification():
                self.note(ResourceUpdated(str(message.params.uri)))
            case types.ResourceListChangedNotification():
                self.note(ResourcesListChanged())

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        self.logs.append(params)
        self._wake()

    def note(self, event: ServerEvent) -> None:
        self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def until(self, enough: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not enough():
                await self._news.wait()


@asynccontextmanager
async def listening(
    server: ErrataServer, mode: str, *uris: str, **options: Any
) -> AsyncIterator[tuple[Client, Heard]]:
    """A client that subscribed to these resources and to their list, in the way of its protocol."""
    heard = Heard()
    async with Client(
        server, mode=mode, message_handler=heard.message, logging_callback=heard.log, **options
    ) as client:
        await told(client, "list_edits")  # the model is loaded
        if mode == "legacy":
            for uri in uris:
                await client.subscribe_resource(uri)
            yield client, heard
            return
        async with (
            client.listen(resources_list_changed=True, resource_subscriptions=uris) as stream,
            anyio.create_task_group() as tasks,
        ):

            async def collect() -> None:
                async for event in stream:
                    heard.note(event)

            tasks.start_soon(collect)
            yield client, heard
            tasks.cancel_scope.cancel()


async def test_an_edit_is_told_to_those_who_subscribed(server: ErrataServer, mode: str) -> None:
    async with listening(server, mode, STATUS, FIRST) as (client, heard):
        await told(client, "apply_edits", edits=[FRANCE])
        expected = {ResourceUpdated(STATUS), ResourceUpdated(FIRST), ResourcesListChanged()}
        await heard.until(lambda: expected <= set(heard.events))
        assert set(heard.events) == expected
        listed = {str(each.uri): each.title for each in (await client.list_resources()).resources}
        assert listed[FIRST] == "e1: The capital of France is Rome"
        heard.events.clear()
        await told(client, "revert_edits", edit_ids=["e1"])
        await heard.until(lambda: expected <= set(heard.events))
        assert FIRST not in {str(each.uri) for each in (await client.list_resources()).resources}


async def test_an_audit_updates_the_edit_but_not_the_list(server: ErrataServer, mode: str) -> None:
    async with listening(server, mode, FIRST) as (client, heard):
        await told(client, "apply_edits", edits=[FRANCE])
        await heard.until(lambda: {ResourceUpdated(FIRST), ResourcesListChanged()} <= set(heard.events))
        heard.events.clear()
        await told(client, "audit_edits")
        await heard.until(lambda: bool(heard.events))
        assert set(heard.events) == {ResourceUpdated(FIRST)}


async def test_a_change_by_one_client_is_told_to_another(server: ErrataServer, mode: str) -> None:
    async with (
        Client(server, mode=mode) as other,
        listening(server, mode, FIRST) as (_, heard),
    ):
        await told(other, "apply_edits", edits=[FRANCE])
        await heard.until(lambda: ResourceUpdated(FIRST) in heard.events)


async def test_nothing_is_told_that_was_not_asked_for(server: ErrataServer, mode: str) -> None:
    async with listening(server, mode, "errata://edits/e2", STATUS) as (client, heard):
        if mode == "legacy":
            await client.unsubscribe_resource("errata://edits/e2")
        await told(client, "apply_edits", edits=[FRANCE])
        await heard.until(lambda: ResourceUpdated(STATUS) in heard.events)
        assert ResourceUpdated(FIRST) not in heard.events
        assert heard.logs == []


async def test_a_job_is_followed_to_its_end_without_asking(server: ErrataServer, mode: str) -> None:
    job = "errata://jobs/j1"
    async with listening(server, mode, job) as (client, heard):
        await told(client, "compute_statistics", layers=[0], tokens=200)
        state = ""
        while state not in ("done", "failed"):
            await heard.until(lambda: ResourceUpdated(job) in heard.events)
            heard.events.clear()
            [content] = (await client.read_resource(job)).contents
            assert isinstance(content, types.TextResourceContents)
            state = types.TextContent(text=content.text).text.partition('"state": "')[2].partition('"')[0]
        assert state == "done"


async def test_what_never_changes_is_not_advertised_as_changing(server: ErrataServer, mode: str) -> None:
    async with Client(server, mode=mode) as client:
        offered = client.server_capabilities
        assert offered.resources
        assert (offered.resources.subscribe, offered.resources.list_changed) == (True, True)
        assert offered.tools
        assert offered.prompts
        assert not offered.tools.list_changed
        assert not offered.prompts.list_changed
        if mode == "auto":
            async with client.listen(tools_list_changed=True, resources_list_changed=True) as stream:
                assert stream.honored.resources_list_changed
                assert not stream.honored.tools_list_changed


async def test_subscriptions_of_one_connection_are_bounded(server: ErrataServer) -> None:
    async with Client(server, mode="legacy") as client:
        for number in range(MOST_SUBSCRIPTIONS):
            await client.subscribe_resource(f"errata://edits/e{number}")
        with pytest.raises(MCPError, match="unsubscribe first"):
            await client.subscribe_resource("errata://edits/e1000000")


async def test_a_connection_is_forgotten_when_it_ends(server: ErrataServer) -> None:
    async with Client(server, mode="legacy") as client:
        await client.subscribe_resource(STATUS)
        assert len(server.subscriptions.peers) == 1
    assert server.subscriptions.peers == []


async def test_the_log_of_a_call_goes_to_the_client_that_asked_for_it(
    server: ErrataServer, mode: str
) -> None:
    async with (
        listening(server, mode, log_level="info") as (client, heard),
        listening(server, mode) as (_, quiet),
    ):
        if mode == "legacy":
            await client.set_logging_level("info")
        await told(client, "apply_edits", edits=[FRANCE])
        await heard.until(lambda: any("apply_edits" in str(entry.data) for entry in heard.logs))
        assert {entry.level for entry in heard.logs} == {"info"}
        assert all(str(entry.logger).startswith("errata") for entry in heard.logs)
        assert quiet.logs == []


async def test_only_what_is_severe_enough_is_sent(settings: Settings, mode: str) -> None:
    slow, heard = Slow(), Heard()
    slow.failure = RuntimeError("a secret")
    slow.release.set()
    server = build(settings, Startup(settings, slow.open))
    async with Client(server, mode=mode, logging_callback=heard.log, log_level="error") as client:
        if mode == "legacy":
            await client.set_logging_level("error")
        await client.call_tool("ask_model", {"prompt": "fails"})
        await heard.until(lambda: bool(heard.logs))
        [entry] = heard.logs
        assert entry.level == "error"
        assert "secret" not in str(entry.data)


async def test_what_happens_in_the_background_is_told_to_all_who_set_a_level(server: ErrataServer) -> None:
    async with listening(server, "legacy") as (client, heard), listening(server, "legacy") as (_, quiet):
        await client.set_logging_level("warning")
        log = logging.getLogger("errata.startup")
        log.info("not severe enough")
        log.warning("the disk is nearly full")
        await heard.until(lambda: bool(heard.logs))
        assert [entry.data for entry in heard.logs] == ["the disk is nearly full"]
        assert quiet.logs == []
