"""Steering as an agent uses it: made, dosed, measured, on the ledger, off again to the bit."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
from mcp import Client

from server.settings import Settings
from tests.tools.clients import Connect, refused
from tests.tools.clients import told as done

pytestmark = pytest.mark.anyio

PAIRS = [
    {"prompt": "The film was", "positive": f"a joy in {place}", "negative": f"a bore in {place}"}
    for place in ("Paris", "London", "Rome", "Berlin", "Madrid")
]
ROME = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}


@pytest.fixture
def mode() -> str:
    """One era is enough here: how tools are called is tested elsewhere."""
    return "auto"


async def created(client: Client, name: str = "mood", **more: Any) -> dict[str, Any]:
    return await done(client, "create_steering_vector", name=name, pairs=PAIRS, **more)


async def ready(client: Client) -> dict[str, Any]:
    await done(client, "list_steering")  # waits for the model
    return await done(client, "model_status")


async def said(client: Client) -> str:
    text = (await done(client, "ask_model", prompt="The capital of France is", max_new_tokens=8))[
        "completion"
    ]
    assert isinstance(text, str)
    return text


async def test_a_dose_is_on_the_ledger_and_off_is_as_before(connect: Connect) -> None:
    async with connect() as client:
        base = await ready(client)
        before = await said(client)
        report = await created(client)
        assert report["layers"]
        assert len(report["sweep"]) == base["layers"]
        on = await done(client, "set_steering", name="mood", multiplier=2, reason="to see")
        assert [(d["name"], d["multiplier"], d["reason"]) for d in on["active"]] == [("mood", 2, "to see")]
        assert on["weights_hash"] == base["weights_hash"]
        assert on["state_hash"] != base["state_hash"]
        status = await done(client, "model_status")
        assert status["active_steering"] == ["mood"]
        assert status["active_edits"] == 0
        row = (await done(client, "list_edits"))["edits"][0]
        assert (row["method"], row["subject"], row["target"]) == ("steering", "mood", "+2")
        assert await said(client) != before
        off = await done(client, "set_steering", name="mood", multiplier=0)
        assert off["active"] == []
        assert off["state_hash"] == base["state_hash"]
        assert await said(client) == before


async def test_a_dose_survives_a_restart_and_can_be_reverted_and_reapplied(connect: Connect) -> None:
    async with connect() as client:
        await created(client)
        first = await done(client, "set_steering", name="mood", multiplier=1)
        on = await done(client, "set_steering", name="mood", multiplier=-2)
        assert [d["multiplier"] for d in on["active"]] == [-2]
        steered = await said(client)
        edit = on["active"][0]["edit_id"]
        assert edit != first["active"][0]["edit_id"]
    async with connect() as client:
        status = await ready(client)
        assert status["active_steering"] == ["mood"]
        assert status["state_hash"] == on["state_hash"]
        assert status["damage"] == []
        assert await said(client) == steered
        gone = await done(client, "revert_edits", edit_ids=[edit])
        assert gone["reverted"] == [edit]
        assert (await done(client, "list_steering"))["active"] == []
        back = await done(client, "reapply_edits", edit_ids=[edit])
        assert (back["status"], back["edit_ids"], back["method"]) == ("applied", [edit], "steering")
        assert await said(client) == steered
        audit = await done(client, "audit_edits")
        assert audit["edits"] == []
        assert audit["integrity"]["problems"] == []
        assert (await done(client, "show_edit", edit_id=edit))["patch"]["kind"] == "steering"


async def test_steering_and_an_edit_are_the_sum_of_their_records(connect: Connect, tmp_path: Path) -> None:
    found = []
    for order in ("steer first", "edit first"):
        async with connect(home=tmp_path / order.replace(" ", "-")) as client:
            base = await ready(client)
            if order == "steer first":
                await created(client)
                await done(client, "set_steering", name="mood", multiplier=1)
            edit = await done(client, "apply_edits", edits=[ROME], method="rome")
            if order == "edit first":
                await created(client)
                await done(client, "set_steering", name="mood", multiplier=1)
            both = await done(client, "model_status")
            found.append((both["weights_hash"], both["state_hash"], await said(client)))
            await done(client, "revert_edits", edit_ids=edit["edit_ids"])
            assert (await done(client, "model_status"))["weights_hash"] == base["weights_hash"]
            await done(client, "set_steering", name="mood", multiplier=0)
            assert (await done(client, "model_status"))["state_hash"] == base["state_hash"]
    assert found[0] == found[1]


async def test_a_repeated_dose_changes_nothing(connect: Connect) -> None:
    async with connect() as client:
        await created(client)
        assert (await done(client, "set_steering", name="mood", multiplier=0.5))["changed"]
        again = await done(client, "set_steering", name="mood", multiplier=0.5)
        assert not again["changed"]
        assert (await done(client, "list_edits"))["total"] == 1


async def test_an_active_vector_is_neither_deleted_nor_replaced(connect: Connect) -> None:
    async with connect() as client:
        await created(client)
        await done(client, "set_steering", name="mood", multiplier=0.5)
        assert "set_steering('mood', 0) first" in await refused(client, "delete_steering_vector", name="mood")
        text = await refused(client, "create_steering_vector", name="mood", pairs=PAIRS, replace=True)
        assert "cannot be replaced" in text
        await done(client, "set_steering", name="mood", multiplier=0)
        assert (await done(client, "delete_steering_vector", name="mood"))["remaining"] == []
        assert (await done(client, "audit_edits"))["integrity"]["problems"] == []


async def test_mistakes_are_told_with_the_way_out(connect: Connect) -> None:
    async with connect() as client:
        assert "there is none yet" in await refused(client, "set_steering", name="none", multiplier=1)
        bad = [*PAIRS, {"positive": "same", "negative": "same"}]
        text = await refused(client, "create_steering_vector", name="bad", pairs=bad)
        assert "pairs[5] has the same text" in text
        for name in ("../up", "a/b", "a.b"):
            assert "name" in await refused(client, "create_steering_vector", name=name, pairs=PAIRS)
        text = await refused(client, "create_steering_vector", name="x", pairs=PAIRS, layers=[99])
        assert "layer 99 does not exist" in text
        text = await refused(client, "create_steering_vector", name="x", method="prompt")
        assert "positive_prompt" in text
        await created(client)
        assert "already" in await refused(client, "create_steering_vector", name="mood", pairs=PAIRS)
        assert "out of range" in await refused(client, "set_steering", name="mood", multiplier=50)
        text = await refused(client, "evaluate_steering", name="mood", score="choice")
        assert "needs pairs" in text
        text = await refused(client, "create_steering_vector", name="x", pairs=PAIRS, answers="texts")
        assert "pairs[0] is no A/B question" in text


async def test_choices_can_be_compared_by_what_they_say(connect: Connect) -> None:
    things = ("tea", "rain", "bread", "snow", "maps", "trains", "cats", "songs", "books")
    pairs = [
        {
            "prompt": f"Do you like {t}?\n\nChoices:\n(A) Yes, I do.\n(B) No.",
            "positive": "(A)",
            "negative": "(B)",
        }
        for t in things
    ]
    async with connect() as client:
        await done(client, "create_steering_vector", name="liking", pairs=pairs, answers="texts")
        arguments = {"name": "liking", "multipliers": [-0.1, 0.1], "score": "choice", "pairs": pairs}
        texts = await done(client, "evaluate_steering", **arguments, answers="texts")
        letters = await done(client, "evaluate_steering", **arguments)
        scores = [row["score"] for row in texts["table"]]
        assert len(set(scores)) == 3
        assert not set(scores) & {row["score"] for row in letters["table"]}


async def test_doses_are_calibrated_and_evaluated_with_a_picture(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("create_steering_vector", {"name": "mood", "pairs": PAIRS})
        assert png(result)
        result = await client.call_tool("calibrate_steering", {"name": "mood", "max_perplexity_ratio": 1.05})
        assert png(result)
        content = result.structured_content or {}
        sound = [p["multiplier"] for p in content["curve"] if p["perplexity_ratio"] <= 1.05]
        assert content["multiplier"] == max(sound)
        assert content["negative_multiplier"] == min(sound)
        kept = await done(client, "query_ledger", sql="SELECT payload FROM events WHERE kind = 'calibrated'")
        assert json.loads(kept["rows"][0][0])["curve"] == content["curve"]  # the board draws it
        arguments = {"name": "mood", "multipliers": [-1, 1], "prompts": ["The film was"], "max_new_tokens": 6}
        for score, more in (
            ("sentiment", {}),
            ("length", {}),
            ("completion", {"completions": ["Paris"]}),
            ("choice", {"pairs": PAIRS, "prompts": None}),
        ):
            result = await client.call_tool("evaluate_steering", arguments | more | {"score": score})
            assert png(result), result.content
            table = (result.structured_content or {})["table"]
            assert [row["multiplier"] for row in table] == [-1, 0, 1]
            assert table[1]["change"] == 0
        assert (await done(client, "list_steering"))["active"] == []


def png(result: Any) -> bool:
    images = [c for c in result.content if c.type == "image"]
    return any(base64.b64decode(c.data).startswith(b"\x89PNG") for c in images)


async def test_pairs_come_from_files_under_home_and_not_from_elsewhere(
    connect: Connect, settings: Settings, tmp_path: Path
) -> None:
    data = settings.home / "data"
    data.mkdir(parents=True)
    (data / "pairs.json").write_text(json.dumps(PAIRS), "utf-8")
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(PAIRS), "utf-8")
    (data / "link.json").symlink_to(outside)
    async with connect() as client:
        await done(client, "create_steering_vector", name="inside", path="pairs.json")
        await done(client, "create_steering_vector", name="absolute", path=str(data / "pairs.json"))
        for path in ("../../outside.json", "link.json", "no.json", "pairs.txt", str(outside)):
            text = await refused(client, "create_steering_vector", name="x", path=path)
            assert "path" in text
    async with connect(folders=(tmp_path,)) as client:
        await done(client, "create_steering_vector", name="elsewhere", path=str(outside))


async def test_a_vector_is_exported_in_both_forms(connect: Connect) -> None:
    async with connect() as client:
        report = await created(client, layers=[1, 2])
        plain = await done(client, "export_steering_vector", name="mood", format="safetensors")
        control = await done(client, "export_steering_vector", name="mood", multiplier=0.5)
        assert "ever overwritten" in await refused(client, "export_steering_vector", name="mood")
    tensors = safetensors.torch.load_file(plain["path"])
    assert sorted(tensors) == [f"layer.{layer}" for layer in report["layers"]]
    reader = gguf.GGUFReader(control["path"])
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    for tensor in reader.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        np.testing.assert_allclose(tensor.data, 0.5 * tensors[f"layer.{layer}"].numpy(), rtol=1e-5)
