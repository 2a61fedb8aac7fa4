"""Every tool that reads a path reaches only the folders that files are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from tests.tools.clients import refused
from tests.tools.conftest import Workplace

pytestmark = pytest.mark.anyio

EDIT = {"subject": "Spain", "prompt": "The capital of {} is", "target": "Rome"}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "train_editor": ("data", {"method": "mend"}),
    "compute_statistics": ("corpus", {}),
    "create_steering_vector": ("path", {"name": "x"}),
    "evaluate_steering": ("path", {"name": "x"}),
    "import_steering_vector": ("path", {"name": "x"}),
    "save_facts": ("path", {"name": "x"}),
    "import_patches": ("path", {}),
    "import_adapter": ("path", {"edits": [EDIT]}),
}
ELSEWHERE = [
    "/dev/zero",
    "/etc/passwd",
    "/proc/self/environ",
    "/etc/no-such-file",
    "../ledger.db",
    "~/.profile",
]


@pytest.mark.parametrize("tool", READERS)
async def test_a_path_elsewhere_is_refused_in_the_words_for_a_file_that_does_not_exist(
    tool: str, client: Client, workplace: Workplace, unchanged: None
) -> None:
    field, others = READERS[tool]
    missing = await refused(client, tool, **others, **{field: "no-such-file"})
    assert "no-such-file' is not there" in missing
    for path in [
        *ELSEWHERE,
        str(Path(__file__)),
        str(workplace.services.workspace.settings.home / "ledger.db"),
    ]:
        text = await refused(client, tool, **others, **{field: path})
        assert text.replace(repr(path), "X") == missing.replace("'no-such-file'", "X")


async def test_no_tool_that_reads_a_path_is_left_out_here(client: Client) -> None:
    tools = (await client.list_tools()).tools
    named = {
        tool.name
        for tool in tools
        for name in tool.input_schema.get("properties", {})
        if any(word in name for word in ("path", "corpus", "data", "folder", "directory")) or name == "file"
    }
    assert named == set(READERS)
