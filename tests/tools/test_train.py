"""Training over MCP: start, watch, cancel, list."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from mcp import Client

from tests.tools.clients import Connect, refused, told

pytestmark = pytest.mark.anyio

SMALL = {"rank": 4, "steps": 4, "records": 30, "validation": 6, "evaluate_every": 2, "group": 4}


@pytest.fixture
def mode() -> str:
    """One era is enough: what is told here does not depend on how the client connected."""
    return "auto"


async def ended(client: Client, job_id: str) -> dict[str, Any]:
    with anyio.fail_after(120):
        while True:
            job = await told(client, "get_job", job_id=job_id)
            if job["state"] not in ("queued", "running"):
                return job
            await anyio.sleep(0.05)


async def test_an_agent_trains_an_editor_and_edits_with_it(connect: Connect) -> None:
    async with connect() as client:
        edit = {"subject": "Oslo", "prompt": "Oslo lies in", "target": "Spain"}
        text = await refused(client, "apply_edits", edits=[edit], method="mend")
        assert "train_editor" in text
        started = await told(client, "train_editor", method="mend", params=SMALL)
        job = await ended(client, started["job_id"])
        assert job["state"] == "done", job["message"]
        assert "mend" in job["next"]
        status = await told(client, "model_status")
        assert next(m for m in status["methods"] if m["name"] == "mend")["ready"]
        report = await told(client, "apply_edits", edits=[edit], method="mend")
        assert report["edit_ids"] == ["e1"]
        back = await told(client, "revert_edits", edit_ids=["e1"])
        assert back["weights_hash"] == status["weights_hash"]
        picture = await client.call_tool("get_job", {"job_id": started["job_id"], "plot": True})
        assert [c.mime_type for c in picture.content if c.type == "image"] == ["image/png"]
        assert [j["job_id"] for j in (await told(client, "list_jobs"))["jobs"]] == ["j1"]


async def test_a_job_can_be_cancelled(connect: Connect) -> None:
    async with connect() as client:
        started = await told(client, "train_editor", method="mend", params=SMALL | {"steps": 100_000})
        job = await told(client, "cancel_job", job_id=started["job_id"])
        assert job["state"] == "cancelled"
        assert (await told(client, "list_jobs", state="running"))["jobs"] == []


async def test_mistakes_are_answered_with_what_to_do(connect: Connect) -> None:
    async with connect() as client:
        assert "has layers 0 to 3" in await refused(client, "compute_statistics", layers=[9])
        assert "steps" in await refused(client, "train_editor", method="mend", params={"step": 3})
        assert "j7" in await refused(client, "get_job", job_id="j7")
        assert "mend" in await refused(client, "train_editor", method="rome")
