"""What answers cost an agent, and that nothing an agent must know is lost by making them short."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client

from server.errors import ServiceError
from server.facts.condensed import MISSES
from server.facts.ids import expanded, named, ranges
from tests.tools.clients import Connect, refused, told
from tests.tools.tokens import tokens
from tools._answers import text_of

pytestmark = pytest.mark.anyio

MANY = 43
QUICKLY = {"max_steps": 3, "contexts": 1}
OFF = {"off": ["all"]}


@pytest.fixture
def mode() -> str:
    """One era is enough: what is told here does not depend on how the client connected."""
    return "auto"


def many(first: int = 0, count: int = MANY) -> list[dict[str, Any]]:
    """Edits of subjects that a random model knows nothing of, so that hardly one holds: the longest report."""
    return [
        {
            "subject": f"the town of Nr{i}",
            "prompt": "The mayor of {} who came last year is",
            "target": "Rome",
        }
        for i in range(first, first + count)
    ]


async def apply(client: Client, edits: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    given = {"method": "memit", "params": QUICKLY, "guard": OFF} | more
    return await told(client, "apply_edits", edits=edits, **given)


async def test_a_report_of_many_edits_is_short_and_names_what_fails(connect: Connect) -> None:
    async with connect() as client:
        preview = await told(
            client, "preview_edits", edits=many(), method="memit", params=QUICKLY, guard=OFF, detail="full"
        )
        report = await apply(client, many())
        audit = await told(client, "audit_edits")
        fails = [r["prompt"] for r in preview["results"] if r["reliability"] < 1 or r["looping"]]
        assert len(preview["results"]) == MANY
        assert report["holding"] + len(fails) == MANY
        assert len(expanded(report["failing"])) == len(fails)
        assert [r["prompt"] for r in report["results"]] == fails[: len(report["results"])]
        assert report["changed_count"] == preview["changed_count"]
        assert len(report["changed"]) == min(12, report["changed_count"])
        assert tokens(report) <= 3_000
        assert tokens(audit) <= 3_000
        assert len(fails) > 8, "the test wants the longest report"
        assert "show_edit" in report["not_listed"]
        shown = await told(client, "show_edit", edit_id=expanded(report["failing"])[-1])
        assert shown["measurements"]
        assert tokens(shown) <= 1_000
        full = await told(client, "show_edit", edit_id=shown["edit"]["edit_id"], detail="full")
        assert tokens(full) > tokens(shown)
        probes = full["measurements"][0]["values"]["details"]
        missed = [p["prompt"] for p in probes if not p["held"] and not p["trained"]]
        short = [p["prompt"] for p in shown["measurements"][0]["values"]["details"]]
        assert all(text.removesuffix("…") in whole for text, whole in zip(short, missed, strict=False))
        assert len(short) == min(MISSES, len(missed))


async def test_a_report_of_few_edits_has_each_of_them(connect: Connect) -> None:
    async with connect() as client:
        report = await apply(client, many(count=3))
    assert [r["edit_id"] for r in report["results"]] == report["edit_ids"] == ["e1", "e2", "e3"]
    assert report["not_listed"] == ""


async def test_ids_of_many_edits_are_ranges_that_every_tool_takes(connect: Connect) -> None:
    async with connect() as client:
        edits = many(count=60)
        report = await apply(client, edits)
        assert report["edit_ids"] == ["e1-e60"]
        back = await told(client, "revert_edits", edit_ids=report["edit_ids"])
        assert back["reverted"] == ["e1-e60"]
        assert (await told(client, "model_status"))["active_edits"] == 0
        await told(client, "reapply_edits", edit_ids=["e2-e4", "e9"])
        audit = await told(client, "audit_edits", edit_ids=["e2-4"], detail="full")
        assert [e["edit_id"] for e in audit["edits"]] == ["e2", "e3", "e4"]
        exported = await told(client, "export_edits", format="patches", name="some", edit_ids=["e2-e3"])
        assert exported["edit_ids"] == ["e2", "e3"]
        assert "e4-e9" in await refused(client, "revert_edits", edit_ids=["e9-e4"])
        assert "e61" in await refused(client, "revert_edits", edit_ids=["e59-e61"])


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_clients_of_the_newest_protocol_are_sent_a_result_once(connect: Connect, mode: str) -> None:
    async with connect() as client:
        result = await client.call_tool("list_methods", {})
    [block] = result.content
    text = block.text  # type: ignore[union-attr]
    if mode == "auto":
        assert tokens(text) <= 250
        assert "structuredContent" in text
        assert result.structured_content is not None
        assert f"methods: {len(result.structured_content['methods'])} entries" in text
    else:
        assert json.loads(text) == result.structured_content


@pytest.mark.parametrize(("wanted", "short"), [("short", True), ("full", False)])
async def test_how_much_text_stands_beside_a_result_can_be_chosen(
    connect: Connect, wanted: str, short: bool
) -> None:
    async with connect(result_text=wanted) as client:
        result = await client.call_tool("list_methods", {})
    [block] = result.content
    assert (tokens(block.text) < tokens(result.structured_content) / 3) == short  # type: ignore[union-attr]


async def test_a_short_result_stands_whole_in_its_text(client: Client) -> None:
    result = await client.call_tool("ask_model", {"prompt": "Rome", "max_new_tokens": 4})
    [block] = result.content
    assert json.loads(block.text) == result.structured_content  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 200), unique=True).map(lambda numbers: [f"e{n}" for n in numbers]))
def test_ranges_mean_the_ids_they_were_made_of(ids: list[str]) -> None:
    assert expanded(ranges(ids)) == ids
    assert expanded(named(ids)) == ids


@pytest.mark.parametrize("wrong", ["e5-e4", "e1-e999999999"])
def test_a_range_that_cannot_be_meant_is_refused_by_its_value(wrong: str) -> None:
    with pytest.raises(ServiceError, match=wrong):
        expanded([wrong])


async def test_a_short_text_says_what_nobody_should_miss(connect: Connect) -> None:
    async with connect(result_text="short") as client:
        given = {"edits": many(count=2), "method": "memit", "params": QUICKLY}
        rejected = await client.call_tool("apply_edits", given | {"guard": {"max_drift": 0.0}})
        kept = await client.call_tool("apply_edits", given | {"guard": OFF})
        back = await client.call_tool("revert_edits", {"edit_ids": ["e3-e4"]})
        audit = await client.call_tool("audit_edits", {})
    for result in (rejected, kept, back, audit):
        assert not result.is_error, result.content
        told, text = result.structured_content, result.content[0].text  # type: ignore[union-attr]
        assert told is not None
        assert tokens(text) <= 500
        for name in ("failed_guard", "warnings"):
            for line in told.get(name, [])[:3]:
                assert line[:100] in text, name
        assert told["next"][:100] in text
    assert rejected.structured_content is not None
    assert rejected.structured_content["failed_guard"]
    assert kept.structured_content is not None
    assert kept.structured_content["warnings"]


def test_the_short_text_of_a_job_says_what_its_result_warns_of() -> None:
    result = {
        "summary": "prod is proven to hold 2 edits",
        "warnings": ["it keeps 0% of neighbours"],
        "far": [{}] * 99,
    }
    job = {
        "job_id": "j1",
        "state": "done",
        "result": result | {"padding": "x" * 900},
        "next": "audit_edits()",
    }
    text = text_of(job, "short", None).text
    for line in ("state: done", "prod is proven to hold 2 edits", "keeps 0% of neighbours", "audit_edits()"):
        assert line in text
    assert "xxx" not in text


async def test_the_state_hash_of_a_report_shows_that_a_memory_left_nothing(connect: Connect) -> None:
    """A memory changes no weight, so that the hash of the weights cannot show it."""
    fact = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
    async with connect() as client:
        await told(client, "list_edits")  # waits for the model
        start = await told(client, "model_status")
        for method in ("grace", "rome"):
            given = {"edits": [fact], "method": method, "guard": OFF, "replace": True}
            preview = await told(
                client, "preview_edits", **{k: v for k, v in given.items() if k != "replace"}
            )
            made = await told(client, "apply_edits", **given)
            back = await told(client, "revert_edits", edit_ids=made["edit_ids"])
            again = await told(client, "reapply_edits", edit_ids=made["edit_ids"])
            assert start["state_hash"].startswith(back["state_hash"])
            assert len(back["state_hash"]) == 16
            assert preview["state_hash"] == back["state_hash"] != made["state_hash"] == again["state_hash"]
            assert (made["weights_hash"] == start["weights_hash"]) == (method == "grace")
            await told(client, "revert_edits", edit_ids=made["edit_ids"])
