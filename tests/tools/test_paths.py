"""Every tool that reads a path reaches only the folders that files are read from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
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


async def test_a_folder_that_a_training_names_is_one_that_files_are_read_from(
    client: Client, workplace: Workplace, unchanged: None
) -> None:
    def given(path: str) -> dict[str, Any]:
        return {"method": "serac", "data": "facts", "params": {"encoder": path}}

    missing = await refused(client, "train_editor", **given("no-such-folder"))
    assert "params.encoder 'no-such-folder' is not there" in missing
    for path in [*ELSEWHERE, str(Path(__file__).parent), "tests/tools", "/", "~/.cache"]:
        text = await refused(client, "train_editor", **given(path))
        assert text.replace(repr(path), "X") == missing.replace("'no-such-folder'", "X")


@pytest.mark.parametrize("tool", [*READERS, "encoder"])
async def test_traps_in_the_folders_that_are_read_from_lead_nowhere_and_make_nobody_wait(
    tool: str, client: Client, workplace: Workplace, tmp_path: Path, unchanged: None
) -> None:
    secret = "s3cr3t-of-another-folder"
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("facts.json", "config.json", "adapter_config.json"):
        (outside / name).write_text(f'[{{"subject": "{secret}", "prompt": "{{}} is", "target": "{secret}"}}]')
    traps = (
        "link.json",
        "folder",
        "folder/facts.json",
        "zero.txt",
        "loop",
        "pipe.json",
        "inside",
        "null.csv",
    )
    home = workplace.services.workspace.settings.home
    for folder in ("data", "imports", "exports"):
        place = home / folder
        place.mkdir(exist_ok=True)
        (place / "link.json").symlink_to(outside / "facts.json")
        (place / "folder").symlink_to(outside)
        (place / "zero.txt").symlink_to("/dev/zero")
        (place / "null.csv").symlink_to("/proc/self/environ")
        (place / "loop").symlink_to("loop")
        os.mkfifo(place / "pipe.json")
        (place / "inside").mkdir()
        os.mkfifo(place / "inside" / "config.json")
    try:
        for path in traps:
            with anyio.fail_after(60):
                if tool == "encoder":
                    given = {"method": "serac", "data": "facts", "params": {"encoder": path}}
                    text = await refused(client, "train_editor", **given)
                else:
                    field, others = READERS[tool]
                    text = await refused(client, tool, **others, **{field: path})
            assert secret not in text
            assert "internal error" not in text
    finally:
        for folder in ("data", "imports", "exports"):
            for name in (
                "link.json",
                "folder",
                "zero.txt",
                "null.csv",
                "loop",
                "pipe.json",
                "inside/config.json",
            ):
                (home / folder / name).unlink()
            (home / folder / "inside").rmdir()
