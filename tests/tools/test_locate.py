"""Toolset `locate` through a client: pictures, the ledger's trace, layers tried and remembered, what lies near."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from mcp import Client

from tests.tools.clients import Connect, refused, told

pytestmark = pytest.mark.anyio

FACT = {"prompt": "The capital of {} is", "subject": "France"}
EDIT: dict[str, Any] = {
    **FACT,
    "target": "Rome",
    "paraphrases": ["France has the capital"],
    "neighbours": [{"prompt": "The capital of Japan is"}],
}


@pytest.fixture
def mode() -> str:
    """One era is enough here: what differs between them is tested with the calls."""
    return "auto"


async def pictured(client: Client, tool: str, **arguments: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """What a tool answers, and the size of the picture beside it."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    (image,) = [block for block in result.content if block.type == "image"]
    assert image.mime_type == "image/png"
    png = base64.b64decode(image.data)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert isinstance(result.structured_content, dict)
    return result.structured_content, struct.unpack(">II", png[16:24])


@pytest.mark.parametrize(
    "method", ["causal_trace", "knowledge_neurons", "logit_lens", "attribution_patching"]
)
async def test_a_fact_is_located_with_a_picture_and_sites(connect: Connect, method: str) -> None:
    async with connect() as client:
        found, size = await pictured(client, "locate_fact", **FACT, method=method, samples=2)
        layers = (await told(client, "model_status"))["layers"]
    assert size[0] == 800
    assert found["sites"]
    assert 0 <= found["best_layer"] < layers
    assert "".join(found["tokens"][i] for i in found["subject_tokens"]).strip() == "France"
    assert found["suggestion"]


async def test_an_edit_shows_the_latest_trace_made_before_it(connect: Connect) -> None:
    async with connect() as client:
        await told(client, "locate_fact", **FACT, method="logit_lens")
        second = await told(client, "locate_fact", **FACT, method="attribution_patching", samples=1)
        await told(client, "apply_edits", edits=[EDIT])
        await told(client, "locate_fact", **FACT, method="logit_lens")
        shown = await told(client, "show_edit", edit_id="e1")
        other = {**EDIT, "subject": "Japan", "paraphrases": [], "neighbours": []}
        await told(client, "apply_edits", edits=[other])
        unseen = await told(client, "show_edit", edit_id="e2")
    assert shown["located"]["event"] == second["event"]
    assert shown["located"]["method"] == "attribution_patching"
    assert unseen["located"] is None


async def test_layers_are_tried_without_a_trace_in_the_model_and_the_best_is_remembered(
    connect: Connect,
) -> None:
    async with connect() as client:
        await told(client, "list_methods")  # waits for the model
        before = await told(client, "model_status")
        found, _ = await pictured(client, "suggest_layers", edits=[EDIT], method="rome")
        after = await told(client, "model_status")
        previewed = await told(client, "preview_edits", edits=[EDIT], params={"layer": "auto"}, method="rome")
    assert before["weights_hash"] == after["weights_hash"]
    assert found["best"] in [c["layers"] for c in found["candidates"]]
    assert sum(c["default"] for c in found["candidates"]) == 1
    assert found["remembered"]
    assert [previewed["params"]["layer"]] == found["best"]
    assert any("earlier suggest_layers" in w for w in previewed["warnings"])


async def test_layer_auto_tries_the_edits_at_hand_when_nothing_is_remembered(connect: Connect) -> None:
    async with connect() as client:
        applied = await told(client, "apply_edits", edits=[EDIT], params={"layer": "auto"}, method="rome")
        rows = await told(client, "query_ledger", sql="SELECT kind FROM events ORDER BY seq")
    assert isinstance(applied["params"]["layer"], int)
    assert any("did best in a trial" in w for w in applied["warnings"])
    assert ["layers_suggested"] in rows["rows"]


async def test_explain_lists_the_facts_that_feel_the_edit_and_how_they_move(connect: Connect) -> None:
    async with connect() as client:
        await told(client, "apply_edits", edits=[{**FACT, "subject": "Japan", "target": "Paris"}])
        report = await told(client, "preview_edits", edits=[EDIT], explain=True)
        plain = await told(client, "preview_edits", edits=[EDIT])
    near = report["nearby"]
    assert {"edit", "canary"} == {n["kind"] for n in near}
    assert [n["edit_id"] for n in near if n["kind"] == "edit"] == ["e1"]
    overlaps = [abs(n["overlap"]) for n in near]
    assert overlaps == sorted(overlaps, reverse=True)
    assert plain["nearby"] == []


async def test_mistakes_in_locating_are_answered_with_what_to_do(connect: Connect) -> None:
    async with connect() as client:
        text = await refused(client, "locate_fact", prompt="The capital of Spain is", subject="France")
        assert "does not contain the subject" in text
        text = await refused(client, "locate_fact", **FACT, window=64)
        assert "window 64" in text
        text = await refused(client, "suggest_layers", edits=[EDIT], layers=[99])
        assert "layers [99] cannot be tried" in text


async def test_a_read_only_server_locates_and_keeps_nothing(connect: Connect) -> None:
    async with connect(read_only=True) as client:
        found = await told(client, "locate_fact", **FACT, method="logit_lens")
    assert found["event"] is None
