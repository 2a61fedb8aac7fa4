"""What surrounds every call: waiting, progress, cancellation, failures, who asked."""

from __future__ import annotations

import logging
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

from server.errors import ModelUnavailable
from server.settings import Settings
from server.startup import Report
from tests.tools.clients import Connect, refused, told
from tests.tools.doubles import Slow
from tools._progress import Progress

pytestmark = pytest.mark.anyio


async def reached(event: threading.Event) -> None:
    """Wait for something a worker thread does."""
    with anyio.fail_after(30):
        assert await anyio.to_thread.run_sync(event.wait, 25)


async def test_the_services_learn_who_asks(connect: Connect) -> None:
    slow = Slow()
    slow.release.set()
    async with connect(slow.open) as client:
        await told(client, "ask_model", prompt="hello")
    assert slow.ctx is not None
    assert slow.ctx.client == "mcp"
    assert slow.ctx.client_version
    assert slow.ctx.request_id


async def test_progress_reaches_the_client_and_only_ever_grows(connect: Connect) -> None:
    slow, seen = Slow(), []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, message))
        if len(seen) == 3:
            slow.release.set()

    async with connect(slow.open) as client:
        with anyio.fail_after(30):
            await client.call_tool("ask_model", {"prompt": "hello"}, progress_callback=on_progress)
    values = [done for done, _ in seen]
    assert values == sorted(set(values))
    assert all(message for _, message in seen)


async def test_a_silent_call_shows_signs_of_life() -> None:
    sent: list[float] = []
    enough = anyio.Event()

    async def send(done: float, total: float | None, message: str | None) -> None:
        sent.append(done)
        if len(sent) == 3:
            enough.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Progress(tick=0.001, heartbeat=0.002).pump, send)
        with anyio.fail_after(10):
            await enough.wait()
        tasks.cancel_scope.cancel()
    assert sent == sorted(set(sent))


async def test_a_cancelled_request_stops_the_work(connect: Connect) -> None:
    slow = Slow()
    async with connect(slow.open) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.call_tool, "ask_model", {"prompt": "hello"})
            await reached(slow.entered)
            tasks.cancel_scope.cancel()
        await reached(slow.left)
        assert slow.ctx is not None
        assert slow.ctx.cancelled.is_set()
        slow.release.set()
        assert (await told(client, "ask_model", prompt="again"))["completion"] == "again"


async def test_a_client_that_goes_away_stops_its_work(connect: Connect) -> None:
    slow = Slow()
    async with anyio.create_task_group() as tasks, connect(slow.open) as client:
        tasks.start_soon(_ignoring_the_end, client)
        await reached(slow.entered)
        tasks.cancel_scope.cancel()
    with anyio.CancelScope(shield=True):
        await reached(slow.left)
    assert slow.ctx is not None
    assert slow.ctx.cancelled.is_set()


async def _ignoring_the_end(client: Any) -> None:
    await client.call_tool("ask_model", {"prompt": "hello"})


async def test_status_answers_while_another_call_works(connect: Connect) -> None:
    slow = Slow()
    async with connect(slow.open) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.call_tool, "ask_model", {"prompt": "hello"})
        await reached(slow.entered)
        with anyio.fail_after(30):
            assert (await told(client, "model_status"))["state"] == "ready"
        slow.release.set()


async def test_an_internal_error_keeps_its_secrets_and_can_be_found_in_the_log(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow()
    slow.release.set()
    slow.failure = RuntimeError("a path nobody should see")
    async with connect(slow.open) as client:
        result = await client.call_tool("ask_model", {"prompt": "hello"})
    text = result.content[0].text  # type: ignore[union-attr]
    assert result.is_error
    assert "a path nobody should see" not in text
    reference = text.split("internal error ")[1].split()[0]
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert reference in record.getMessage()
    assert record.exc_info


class Loading:
    """An opener that loads until told to go on."""

    def __init__(self, then: Slow | Exception) -> None:
        self.go_on = threading.Event()
        self.then = then

    def open(self, settings: Settings, report: Report) -> Any:
        report(1, 2, "reading the weights")
        self.go_on.wait(60)
        if isinstance(self.then, Exception):
            raise self.then
        return self.then


async def test_status_answers_while_the_model_loads(connect: Connect) -> None:
    loading = Loading(Slow())
    async with connect(loading.open) as client:
        status = await told(client, "model_status")
        assert status["state"] == "loading"
        assert status["home"]
        assert status["version"]
        loading.go_on.set()


async def test_a_call_during_loading_waits_and_says_what_for(connect: Connect) -> None:
    slow = Slow()
    slow.release.set()
    loading = Loading(slow)
    messages = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        messages.append(message)
        if message == "waiting for the model: reading the weights":
            loading.go_on.set()

    async with connect(loading.open) as client:
        with anyio.fail_after(30):
            result = await client.call_tool("ask_model", {"prompt": "hi"}, progress_callback=on_progress)
    assert not result.is_error
    assert "waiting for the model: reading the weights" in messages


@pytest.mark.parametrize("failure", [ModelUnavailable("the disk is full"), OSError("the disk is full")])
async def test_a_failed_load_leaves_a_server_that_says_why(connect: Connect, failure: Exception) -> None:
    loading = Loading(failure)
    loading.go_on.set()
    async with connect(loading.open) as client:
        for _ in range(2):
            assert "the disk is full" in await refused(client, "ask_model", prompt="hello")
        status = await told(client, "model_status")
    assert status["state"] == "failed"
    assert "the disk is full" in status["message"]
