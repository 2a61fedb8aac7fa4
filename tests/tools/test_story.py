"""The usual course of an agent's work, through a client, on a real (tiny) model."""

from __future__ import annotations

from typing import Any

import pytest
from mcp import Client

from tests.tools.clients import Connect, refused, told
from tests.tools.tokens import tokens

pytestmark = pytest.mark.anyio

FRANCE: dict[str, Any] = {
    "subject": "France",
    "prompt": "The capital of {} is",
    "target": "Rome",
    "paraphrases": ["The seat of government of France is"],
    "neighbours": [{"prompt": "The capital of Spain is"}],
}
JAPAN = {"subject": "Japan", "prompt": "The capital of {} is", "target": "Paris"}
TOWER = {"subject": "🗼", "prompt": "I can see {} in", "target": "Tokyo"}


async def weights(client: Client) -> Any:
    """The hash of the live weights; waits for the model."""
    await told(client, "list_edits")
    return (await told(client, "model_status"))["weights_hash"]


async def test_a_correction_is_previewed_applied_and_taken_back(connect: Connect) -> None:
    async with connect() as client:
        pristine = await weights(client)
        preview = await told(client, "preview_edits", edits=[FRANCE], method="rome")
        assert (preview["status"], preview["edit_ids"]) == ("previewed", [])
        assert await weights(client) == pristine

        report = await told(
            client, "apply_edits", edits=[FRANCE], method="rome", reason="a test", source="an atlas"
        )
        assert (report["status"], report["edit_ids"]) == ("applied", ["e1"])
        (result,) = report["results"]
        assert result["p_target_after"] != result["p_target_before"]
        assert result["generality"] is not None
        assert result["locality"] is not None
        assert report["drift"]["kl"] >= 0
        assert await weights(client) == report["weights_hash"] != pristine

        reverted = await told(client, "revert_edits", edit_ids=["e1"], reason="only a test")
        assert reverted["reverted"] == ["e1"]
        assert reverted["weights_hash"] == await weights(client) == pristine

        again = await told(client, "reapply_edits", edit_ids=["e1"])
        assert again["weights_hash"] == report["weights_hash"]


async def test_the_ledger_tells_what_was_done_and_by_whom(connect: Connect) -> None:
    async with connect() as client:
        await told(client, "apply_edits", edits=[FRANCE, TOWER], reason="a test", source="an atlas")
        await told(client, "revert_edits", edit_ids=["e2"], reason="no tower there")

        listed = await told(client, "list_edits", status="active")
        assert [(e["edit_id"], e["client"]) for e in listed["edits"]] == [("e1", "mcp")]
        assert (await told(client, "list_edits", subject="🗼"))["total"] == 1
        assert (await told(client, "list_edits", text="Rome"))["edits"][0]["edit_id"] == "e1"

        shown = await told(client, "show_edit", edit_id="e2")
        assert shown["edit"]["status"] == "reverted"
        assert shown["batch"] == ["e1"]
        assert shown["events"][-1]["reason"] == "no tower there"

        rows = await told(
            client, "query_ledger", sql="SELECT id, target FROM edits WHERE target = ?", params=["Tokyo"]
        )
        assert rows["rows"] == [["e2", "Tokyo"]]


async def test_long_lists_come_in_pages(connect: Connect) -> None:
    async with connect() as client:
        await told(client, "apply_edits", edits=[FRANCE, JAPAN, TOWER])
        first = await told(client, "list_edits", limit=2)
        second = await told(client, "list_edits", limit=2, cursor=first["next_cursor"])
    found = [e["edit_id"] for page in (first, second) for e in page["edits"]]
    assert sorted(found) == ["e1", "e2", "e3"]
    assert (first["total"], second["next_cursor"]) == (3, None)


async def test_an_edit_that_breaks_a_bound_is_not_kept(connect: Connect) -> None:
    async with connect() as client:
        pristine = await weights(client)
        report = await told(client, "apply_edits", edits=[FRANCE], method="rome", guard={"max_drift": 0})
        assert report["status"] == "rejected"
        assert report["edit_ids"] == []
        assert "drift" in report["failed_guard"][0]
        assert await weights(client) == pristine
        assert (await told(client, "list_edits"))["edits"][0]["status"] == "rejected"


async def test_an_audit_finds_everything_in_order(connect: Connect) -> None:
    async with connect() as client:
        await told(client, "apply_edits", edits=[FRANCE])
        audit = await told(client, "audit_edits")
    assert audit["integrity"] == {"chain": True, "blobs": True, "weights": True, "problems": []}
    assert [e["edit_id"] for e in audit["edits"]] == ["e1"]


async def test_a_belief_is_checked_against_the_right_answer(connect: Connect) -> None:
    facts = [
        {"prompt": "The capital of {} is", "subject": "France", "expected": "Paris", "alternatives": ["Rome"]}
    ]
    async with connect() as client:
        answer = await told(client, "check_facts", facts=facts)
    (fact,) = answer["facts"]
    assert fact["prompt"] == "The capital of France is"
    assert fact["expected"]["text"] == "Paris"
    assert fact["expected"]["logprob"] < 0 <= fact["expected"]["rank"]
    assert [a["text"] for a in fact["alternatives"]] == ["Rome"]


async def test_the_pristine_model_answers_beside_the_edited_one(connect: Connect) -> None:
    question = {"prompt": "The capital of France is", "compare_to_base": True}
    async with connect() as client:
        before = await told(client, "ask_model", **question)
        edited = await told(client, "apply_edits", edits=[FRANCE])
        after = await told(client, "ask_model", **question)
        assert before["completion"] == before["base_completion"] == after["base_completion"]
        assert await weights(client) == edited["weights_hash"]


async def test_sampling_with_a_seed_repeats(connect: Connect) -> None:
    async with connect() as client:
        one, same, other = [
            (await told(client, "ask_model", prompt="Once", temperature=2.0, seed=seed))["completion"]
            for seed in (1, 1, 2)
        ]
    assert one == same != other


async def test_the_methods_come_with_their_parameters(connect: Connect) -> None:
    async with connect() as client:
        listed = await told(client, "list_methods")
        [rome] = (await told(client, "list_methods", name="rome"))["methods"]
        text = await refused(client, "list_methods", name="rom")
    assert "layer" in rome["params"]["properties"]
    assert {"name": "rome", "when": rome["when"], "ready": True, "exportable": True} in listed["methods"]
    assert listed["auto"]
    assert "'rom'" in text
    assert tokens(listed) <= 1_500


async def test_a_new_server_finds_the_edits_of_the_one_before(connect: Connect) -> None:
    async with connect() as client:
        applied = await told(client, "apply_edits", edits=[FRANCE])
    async with connect() as client:
        assert await weights(client) == applied["weights_hash"]
        status = await told(client, "model_status")
    assert (status["active_edits"], status["damage"]) == (1, [])


async def test_a_second_server_on_the_same_home_says_who_has_it(connect: Connect) -> None:
    async with connect() as first:
        await told(first, "apply_edits", edits=[FRANCE])
        async with connect() as second:
            text = await refused(second, "ask_model", prompt="hello")
            status = await told(second, "model_status")
        assert status["state"] == "failed"
        assert status["message"] in text
        assert status["home"] in text
        assert (await told(first, "model_status"))["state"] == "ready"


async def test_a_read_only_server_reads_beside_one_that_writes(connect: Connect) -> None:
    async with connect() as writer:
        applied = await told(writer, "apply_edits", edits=[FRANCE])
        async with connect(read_only=True) as reader:
            assert await weights(reader) == applied["weights_hash"]
            preview = await told(reader, "preview_edits", edits=[JAPAN])
            audit = await told(reader, "audit_edits", repair=True)
            status = await told(reader, "model_status")
    assert preview["status"] == "previewed"
    assert audit["integrity"]["problems"] == []
    assert status["read_only"]
