"""The whole story of a fact set through a client: a list from a file, checked, planned, put right, exported."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from server.settings import Settings
from tests.tools.clients import Connect, refused, told
from tests.tools.tokens import tokens

pytestmark = pytest.mark.anyio

TEMPLATES = {
    "Hauptstadt": "The capital of {} is",
    "Sprache": "The official language of {} is",
    "Kontinent": "{} is located on the continent of",
    "Land": "{} is located in the country of",
}
WORDS = ("Rome", "Paris", "Oslo", "Bern", "Lima", "Cairo", "Tokyo", "Athens", "Delhi", "Quito")
POLICY = {"method": "constrained", "batch": 50}


@pytest.fixture
def mode() -> str:
    """One era is enough: what is told here does not depend on how the client connected."""
    return "auto"


def write(settings: Settings, rows: Iterable[tuple[str, ...]]) -> None:
    (settings.home / "data").mkdir(parents=True, exist_ok=True)
    with (settings.home / "data" / "wissen.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Thema", "Eigenschaft", "Wert", "Stand"])
        writer.writerows(rows)


def listed(count: int) -> list[tuple[str, ...]]:
    """So many facts of four relations; the last ten contradict five others."""
    rows = [
        (f"Place{i // 4}", list(TEMPLATES)[i % 4], WORDS[i % len(WORDS)], "2026-11-01")
        for i in range(count - 5)
    ]
    return [*rows, *((place, relation, "Nowhere", "2026-11-02") for place, relation, *_ in rows[:5])]


class Counted:
    """A client whose calls and tokens are counted."""

    def __init__(self, client: Client) -> None:
        self.client, self.calls, self.cost = client, 0, 0

    async def told(self, tool: str, **arguments: Any) -> dict[str, Any]:
        self.calls += 1
        answer = await told(self.client, tool, **arguments)
        self.cost += tokens(arguments) + tokens(answer)
        return answer


async def test_two_hundred_facts_are_put_right_in_twelve_calls_and_few_tokens(
    connect: Connect, settings: Settings
) -> None:
    count = 200
    write(settings, listed(count))
    async with connect() as client:
        hand = {"subject": "Place9", "prompt": "The capital of {} is", "target": "Vienna"}
        await told(client, "apply_edits", edits=[hand], method="constrained")
        agent = Counted(client)
        columns = {"subject": "Thema", "relation": "Eigenschaft", "answer": "Wert", "as_of": "Stand"}
        saved = await agent.told(
            "save_facts", name="wissen", path="wissen.csv", columns=columns, template=TEMPLATES
        )
        assert saved["summary"] == f"{count} facts; 5 contradictions."
        checked = (await agent.told("check_facts", set="wissen", wait_seconds=300))["set"]
        assert checked["state"] == "done"
        assert sum(checked["counts"][v] for v in ("agrees", "differs", "unsure")) == count
        report = await agent.told("correct_facts", set="wissen", policy=POLICY, wait_seconds=600)
        assert report["status"] == "corrected", report
        assert report["outcomes"]["done"]["count"] == count - 11
        assert report["outcomes"]["skipped"]["count"] == 11
        assert await agent.told("show_fact_set", name="wissen", kind="skipped", limit=20)
        again = (await agent.told("check_facts", set="wissen", wait_seconds=300))["set"]
        assert again["counts"]["agrees"] >= count - 11
        exported = await agent.told("export_fact_set", name="wissen")
    with Path(exported["path"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows].count("done") == count - 11
    assert all(row["why"] for row in rows if row["outcome"] == "skipped")
    assert agent.calls <= 12
    assert agent.cost <= 12_000, agent.cost


async def test_a_plan_is_shown_and_carried_out_by_a_second_call(connect: Connect) -> None:
    facts = [{"subject": "Peru", "prompt": "The capital of {} is", "answer": "Rome"}]
    async with connect() as client:
        await told(client, "save_facts", name="s", facts=facts)
        plan = await told(client, "correct_facts", set="s", policy=POLICY, approve="ask", wait_seconds=60)
        assert plan["status"] == "planned"
        assert (await told(client, "list_edits"))["total"] == 0
        asked = await told(client, "get_job", job_id=plan["job_id"])
        assert asked["next"] == plan["next"] == f'correct_facts("s", plan="{plan["job_id"]}") carries it out.'
        done = await told(client, "correct_facts", set="s", plan=plan["job_id"], wait_seconds=60)
        asked = await told(client, "get_job", job_id=plan["job_id"])
        assert f"carried out by {done['job_id']}" in asked["next"]
        assert (await told(client, "get_job", job_id=done["job_id"]))["next"] == done["next"]
        assert done["outcomes"] == {"done": {"count": 1, "numbers": "1"}}
        job = await told(client, "get_job", job_id=done["job_id"], wait_seconds=5)
        assert job["result"]["summary"] == done["summary"]
        for action in ("pause", "resume", "cancel"):
            ended = await told(client, "cancel_job", job_id=done["job_id"], action=action)
            assert ended["state"] == "done"
            assert f"there was nothing to {action}" in ended["next"]
        again = await told(client, "correct_facts", set="s", policy=POLICY, approve="ask", wait_seconds=60)
        await told(client, "save_facts", name="s", facts=[facts[0] | {"answer": "Oslo"}])
        assert "this plan is invalid" in (await told(client, "get_job", job_id=again["job_id"]))["next"]


async def test_a_job_that_takes_longer_than_one_waits_is_named(connect: Connect) -> None:
    facts = [{"subject": f"P{i}", "prompt": "The capital of {} is", "answer": "Rome"} for i in range(8)]
    async with connect() as client:
        await told(client, "save_facts", name="s", facts=facts)
        report = await told(client, "correct_facts", set="s", policy=POLICY, wait_seconds=0)
        assert report["status"] in ("queued", "running")
        assert f'get_job("{report["job_id"]}"' in report["next"]
        job = await told(client, "get_job", job_id=report["job_id"], wait_seconds=120)
        assert job["state"] == "done"
        assert job["result"]["outcomes"]["done"]["count"] == 8


async def test_what_cannot_be_done_is_said(connect: Connect) -> None:
    async with connect() as client:
        assert "list_fact_sets" in await refused(client, "check_facts")
        assert "there is none yet" in await refused(client, "check_facts", set="x")
        assert "there is none yet" in await refused(client, "correct_facts", set="x")
        assert "either path" in await refused(client, "save_facts", name="x")
        assert "on_damage" in await refused(client, "correct_facts", set="x", policy={"on_damage": "pray"})
        assert "beginning with a letter" in await refused(client, "save_facts", name="../x", facts=[{"a": 1}])
