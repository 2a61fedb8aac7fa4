"""An agent starts the server on another checkpoint and carries the edits over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import parts
from tests.tools.clients import Connect, refused, told
from tests.tools.tokens import tokens

pytestmark = pytest.mark.anyio

FACTS = [
    {"subject": place, "prompt": "The capital of {} is", "target": target}
    for place, target in (("Peru", "Rome"), ("Mali", "Paris"), ("Oman", "Oslo"))
]


@pytest.fixture
def mode() -> str:
    """One era is enough: what is told here does not depend on how the client connected."""
    return "auto"


@pytest.fixture
def successor(tmp_path: Path) -> str:
    """The tiny model of the other tests, fine-tuned a little."""
    model, words = parts("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.0001)
    model.save_pretrained(tmp_path / "successor")
    words.save_pretrained(tmp_path / "successor")
    return str(tmp_path / "successor")


async def test_edits_follow_to_a_fine_tuned_successor(connect: Connect, successor: str) -> None:
    async with connect() as client:
        await told(client, "apply_edits", edits=FACTS, method="constrained", source="the atlas")
        assert "no other model" in await refused(client, "rebase_edits")
        assert f"--model {successor}" in await refused(client, "rebase_edits", to=successor)
    async with connect(model=successor) as client:
        await told(client, "list_edits")  # waits for the model
        assert "rebase_edits" in (await told(client, "model_status"))["message"]
        plan = await told(client, "rebase_edits", approve="ask", wait_seconds=120)
        assert plan["outcomes"] == {"kept": {"count": 3, "edits": ["e1-e3"]}}, plan
        assert (await told(client, "model_status"))["active_edits"] == 0
        report = await told(client, "rebase_edits", plan=plan["job_id"], wait_seconds=120)
        assert (report["status"], report["edits"]) == ("rebased", ["e4-e6"])
        assert tokens(report) <= 600
        told_later = await told(client, "get_job", job_id=report["job_id"])
        assert told_later["next"] == report["next"]
        shown = await told(client, "show_edit", edit_id="e4")
        assert shown["request"]["rebased"] == {"from": "e1", "how": "kept"}
        assert "Rome" in (await told(client, "ask_model", prompt="The capital of Peru is"))["completion"]
        await told(client, "revert_edits", edit_ids=report["edits"])
        assert (await told(client, "model_status"))["active_edits"] == 0
    async with connect() as client:
        assert (await told(client, "list_edits", status="active"))["total"] == 3
        assert (await told(client, "model_status"))["active_edits"] == 3
