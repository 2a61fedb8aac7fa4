"""Export and import as an agent does it, from one server to another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings
from tests.tools.clients import Connect, refused, told

pytestmark = pytest.mark.anyio

EDIT: dict[str, Any] = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
QUICK = {"mode": "simplified", "max_steps": 2}


async def test_edits_go_from_one_server_to_another(
    connect: Connect, settings: Settings, tmp_path: Path
) -> None:
    async with connect() as client:
        applied = await told(client, "apply_edits", edits=[EDIT], method="rome", params=QUICK)
        bundle = await told(client, "export_edits", format="patches", name="facts")
        adapter = await told(client, "export_edits", format="lora", name="adapter", edit_ids=["e1"])
    other = tmp_path / "other"
    (other / "imports").mkdir(parents=True)
    shutil.copy(bundle["path"], other / "imports")
    shutil.copytree(adapter["path"], other / "imports" / "adapter")
    async with connect(home=other) as client:
        imported = await told(client, "import_patches", path="facts.zip", reason="as agreed")
        assert imported["weights_hash"] == applied["weights_hash"] == bundle["weights_hash"]
        assert "e1 is active" in await refused(client, "import_patches", path="facts.zip")
        assert "e1 is active" in await refused(client, "import_adapter", path="adapter", edits=[EDIT])
        await told(client, "revert_edits", edit_ids=["e1"])
        again = await told(client, "import_adapter", path="adapter", edits=[EDIT])
        assert again["weights_hash"] == applied["weights_hash"]
        assert (await told(client, "show_edit", edit_id="e2"))["params"] == {}, "short, if not asked for all"
        shown = await told(client, "show_edit", edit_id="e2", detail="full")
        assert shown["params"]["adapter_config"]["peft_type"] == "LORA"


async def test_mistakes_are_told_with_the_way_out(connect: Connect) -> None:
    async with connect() as client:
        assert "apply_edits first" in await refused(client, "export_edits", format="lora", name="x")
        assert "must be one of" in await refused(client, "export_edits", format="onnx", name="x")
        assert "cannot be used" in await refused(client, "export_edits", format="lora", name="../x")
        assert "imports" in await refused(client, "import_patches", path="/etc/passwd")
        assert "imports" in await refused(client, "import_adapter", path="none", edits=[EDIT])


async def test_a_read_only_server_neither_exports_nor_imports(connect: Connect) -> None:
    async with connect(read_only=True) as client:
        assert "read-only" in await refused(client, "export_edits", format="lora", name="x")
        assert "read-only" in await refused(client, "import_patches", path="x")
