"""Calls that wait for the model: what only reads does not wait, who is gone does not count, all see their progress."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client

import tools
from server.priority import BEHIND
from server.services import Services
from server.settings import TOOLSETS
from tests.tools.clients import refused, told
from tests.tools.conftest import Workplace
from tools._progress import SHARE, TOTAL, Progress

pytestmark = pytest.mark.anyio

ASKS = 40
READS: dict[str, dict[str, Any]] = {
    "model_status": {},
    "list_edits": {},
    "show_edit": {"edit_id": "e1"},
    "query_ledger": {"sql": "SELECT count(*) FROM edits"},
    "list_methods": {},
    "list_steering": {},
    "list_jobs": {},
    "list_engines": {},
    "list_fact_sets": {},
}
REFUSED_READS: dict[str, dict[str, Any]] = {
    "get_job": {"job_id": "j99"},
    "cancel_job": {"job_id": "j99"},
    "push_edits": {"engine": "none"},
    "save_facts": {"name": "none", "path": "nowhere.json"},
    "show_fact_set": {"name": "none"},
    "correct_facts": {"set": "none"},
    "rebase_edits": {"from_model": "none"},
    "export_fact_set": {"name": "none", "file_name": "none"},
    "train_editor": {"method": "mend", "data": "/nowhere"},
    "compute_statistics": {"layers": [99]},
    "calibrate_editing": {"methods": ["memo"]},
}
TOGETHER = {"ask_model", "check_facts", "correct_facts", "rebase_edits"}


@contextmanager
def busy(services: Services) -> Iterator[None]:
    """Somebody else uses the model in this block."""
    queue, granted = services.workspace.queue, threading.Event()
    ticket = queue.take(granted.set)
    try:
        assert granted.wait(30), "another call keeps the model"  # one of the test before may still be ending
        assert queue.begin(ticket)
        yield
    finally:
        queue.end(ticket) if ticket.begun else queue.withdraw(ticket)


async def until(condition: Any) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.005)


def test_every_tool_takes_its_turn_or_is_known_to_read() -> None:
    offered = [spec for toolset in tools.TOOLSETS if toolset.name in TOOLSETS for spec in toolset.specs]
    waiting = {spec.name for spec in offered if spec.takes_turn}
    assert waiting | set(READS) | set(REFUSED_READS) | TOGETHER == {spec.name for spec in offered}
    assert not waiting & (set(READS) | set(REFUSED_READS) | TOGETHER)


async def test_what_only_reads_is_answered_while_the_model_is_busy_and_many_wait(
    client: Client, workplace: Workplace
) -> None:
    services = workplace.services
    with busy(services):
        async with anyio.create_task_group() as tasks:
            for n in range(ASKS):
                tasks.start_soon(client.call_tool, "ask_model", {"prompt": f"hello {n}"})
                tasks.start_soon(client.call_tool, "locate_fact", {"prompt": "Rome is in", "subject": "Rome"})
            await until(lambda: services.answers.waiting == ASKS and services.workspace.queue.waiting > ASKS)
            with anyio.fail_after(60):
                for name, given in READS.items():
                    await told(client, name, **given)
                for name, given in REFUSED_READS.items():
                    await refused(client, name, **given)
                await client.read_resource("errata://status")
                await client.read_resource("errata://edits/e1")
            assert services.answers.waiting == ASKS
            tasks.cancel_scope.cancel()
        await until(lambda: services.answers.waiting == 0 and services.workspace.queue.waiting <= 1)


async def test_waiting_calls_hold_no_thread(client: Client, workplace: Workplace) -> None:
    from tools._tool import _readers, _workers

    services = workplace.services
    with busy(services):
        async with anyio.create_task_group() as tasks:
            for n in range(ASKS):
                tasks.start_soon(client.call_tool, "ask_model", {"prompt": f"hello {n}"})
                tasks.start_soon(client.call_tool, "audit_edits", {})
            await until(lambda: services.answers.waiting == ASKS and services.workspace.queue.waiting > ASKS)
            assert _readers.borrowed_tokens == 0
            assert _workers._idle_semaphore._value == len(_workers._threads)  # all of them are idle
            tasks.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives single threads a priority")
async def test_threads_that_work_on_the_model_stand_behind_the_event_loop(client: Client) -> None:
    await told(client, "audit_edits")
    await told(client, "ask_model", prompt="hello", max_new_tokens=1)
    behind = [t for t in threading.enumerate() if t.name.startswith("errata-model") and t.native_id]
    assert behind
    usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert {os.getpriority(os.PRIO_PROCESS, t.native_id or 0) for t in behind} == {min(usual + BEHIND, 19)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == usual


async def test_a_full_queue_answers_at_once_with_how_many_are_before(
    client: Client, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = workplace.services
    monkeypatch.setattr(services.workspace.queue, "most", 2)
    with busy(services):
        async with anyio.create_task_group() as tasks:
            for n in range(2):
                tasks.start_soon(client.call_tool, "ask_model", {"prompt": f"hello {n}"})
            await until(lambda: services.answers.waiting == 2)
            assert "2 calls are before this one" in await refused(client, "ask_model", prompt="hello")
            await until(lambda: services.workspace.queue.waiting == 1)  # the thread that answers
            tasks.start_soon(client.call_tool, "audit_edits", {})
            await until(lambda: services.workspace.queue.waiting == 2)
            assert "the model is busy: 3 calls" in await refused(client, "audit_edits")
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("tool", "given"),
    [
        ("ask_model", {"prompt": "hello", "max_new_tokens": 4, "compare_to_base": True}),
        ("check_facts", {"facts": [{"prompt": "Rome is in", "expected": "Italy"}] * 40}),
        ("locate_fact", {"prompt": "Rome is in", "subject": "Rome"}),
        ("preview_edits", {"edits": [{"subject": "Rome", "prompt": "{} is in", "target": "Spain"}]}),
        ("audit_edits", {}),
        ("list_edits", {}),
    ],
)
async def test_progress_is_a_bar_that_a_person_can_watch(
    client: Client, workplace: Workplace, tool: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools._progress.TICK", 0.01)
    seen: list[tuple[float, float | None, str | None]] = []

    async def on_progress(done: float, total: float | None, message: str | None) -> None:
        seen.append((done, total, message))

    with anyio.fail_after(120):
        result = await client.call_tool(tool, given, progress_callback=on_progress)
    assert not result.is_error
    values = [done for done, _, _ in seen]
    assert values[0] == 0
    assert values[-1] == TOTAL
    assert values == sorted(set(values))
    assert {total for _, total, _ in seen} == {TOTAL}
    assert all(message for _, _, message in seen)


@given(
    st.lists(
        st.tuples(
            st.floats(-5, 50, allow_nan=False), st.floats(-1, 20, allow_nan=False), st.sampled_from(["", "x"])
        ),
        max_size=40,
    )
)
def test_whatever_is_reported_the_bar_rises_and_never_passes_its_end(steps: list[Any]) -> None:
    sent: list[tuple[float, float | None, str | None]] = []

    async def watch() -> None:
        progress, left = Progress(tick=0.0, heartbeat=0.0), list(steps)

        async def send(done: float, total: float | None, message: str | None) -> None:
            sent.append((done, total, message))
            if left:
                progress(*left.pop(0))
            elif len(sent) > len(steps) + 3:
                scope.cancel()

        with anyio.CancelScope() as scope:
            await progress.pump(send)
        await progress.finish(send)

    anyio.run(watch)
    values = [done for done, _, _ in sent]
    assert values == sorted(set(values))
    assert (values[0], values[-1]) == (0, TOTAL)
    assert all(total == TOTAL and message for _, total, message in sent)


async def test_a_hundred_calls_together_are_told_no_more_often_than_a_machine_can_say() -> None:
    sent: Counter[str] = Counter()

    async def call(number: int) -> None:
        progress = Progress(tick=0.01, heartbeat=0.02)

        async def send(done: float, total: float | None, message: str | None) -> None:
            sent["all" if number else "first"] += 1
            progress(min(done + 1, 90), 100, "a step")

        await progress.pump(send)

    async with anyio.create_task_group() as tasks:  # a few are told of every step
        for number in range(3):
            tasks.start_soon(call, number)
        await until(lambda: sum(sent.values()) > 3 + 20)
        tasks.cancel_scope.cancel()
    sent.clear()
    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(call, number)
        await anyio.sleep(1.0)
        tasks.cancel_scope.cancel()
    seconds = time.monotonic() - started
    assert sum(sent.values()) - 100 <= seconds / (90 * SHARE) * 100  # each begins with one
    assert Progress._pumping == 0


async def test_however_many_calls_wait_each_is_told_within_the_patience_of_a_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Progress, "_pumping", 1_000_000)
    monkeypatch.setattr("tools._progress.SLOWEST", 0.02)
    sent: list[float] = []

    async def send(done: float, total: float | None, message: str | None) -> None:
        sent.append(done)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Progress(tick=0.01, heartbeat=0.01).pump, send)
        await until(lambda: len(sent) > 2)
        tasks.cancel_scope.cancel()


async def test_one_phase_fills_the_bar_and_a_second_one_gets_what_is_left() -> None:
    progress, sent = Progress(tick=0.0, heartbeat=0.0), []
    for done, total in ((1, 2), (2, 4), (3, 4), (0, 2), (1, 2)):
        progress(done, total, "x")
        sent.append(progress._place())
    assert sent == [0.5, 0.5, 0.75, 0.75, 0.875]


@pytest.mark.parametrize("tool", ["ask_model", "check_facts"])
async def test_a_cancelled_question_stops_within_tokens(
    client: Client, workplace: Workplace, tool: str
) -> None:
    services = workplace.services
    given: dict[str, Any] = {
        "ask_model": {"prompt": "Rome", "max_new_tokens": 450},
        "check_facts": {"facts": [{"prompt": f"Rome {n} is in", "expected": "Italy"} for n in range(400)]},
    }[tool]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call_tool, tool, given)
        await until(lambda: services.workspace.queue._current is not None)
        tasks.cancel_scope.cancel()
    with anyio.fail_after(10):
        while services.workspace.queue._current is not None or services.answers.waiting:
            await anyio.sleep(0.005)
