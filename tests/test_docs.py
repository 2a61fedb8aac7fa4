"""What the README and the reference say is so: commands, snippets, names and links."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import anyio
import pytest

import tools
from docs import generate
from server import maintenance
from server.settings import Settings
from store import Ledger
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HAS_MAKE = shutil.which("make") is not None


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language in the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The commands the README tells people to type, without comments."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def accepted(arguments: list[str]) -> bool:
    """True when the server takes these arguments."""
    try:
        if arguments and arguments[0] in maintenance.COMMANDS:
            maintenance.parse(arguments)
        else:
            Settings.parse(arguments)
    except SystemExit as done:
        return done.code == 0
    return True


def test_the_reference_is_what_the_code_says() -> None:
    written = generate.TARGET.read_text(encoding="utf-8")
    assert written == anyio.run(generate.reference), "docs/tools.md is stale: run `make docs`"


def test_the_page_of_constants_is_what_the_code_says() -> None:
    written = generate.CONSTANTS.read_text(encoding="utf-8")
    assert written == generate.constants(), "docs/constants.md is stale: run `make docs`"


def test_every_argument_and_result_in_the_reference_has_a_type_that_is_explained() -> None:
    page = generate.TARGET.read_text(encoding="utf-8")
    explained = {line[4:].lower() for line in page.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\]\(#([a-z]+)\)", page)) <= explained | {"types"}
    assert "| any |" not in page


def test_the_table_of_tools_in_the_readme_is_what_the_code_says() -> None:
    assert generate.readme() == README, "the README's table of tools is stale: run `make docs`"
    for toolset in tools.TOOLSETS:
        assert all(f"`{spec.name}`" in README for spec in toolset.specs)


@pytest.mark.parametrize("block", blocks("json"))
def test_a_client_configuration_is_json_that_starts_the_server(block: str) -> None:
    configuration = json.loads(block)
    (server,) = configuration.get("servers", configuration.get("mcpServers")).values()
    if "url" in server:
        return  # tests/test_packaging.py connects with these
    assert server["command"] in PROJECT["scripts"]
    assert accepted(server["args"])


def test_there_is_a_configuration_for_each_client() -> None:
    for client in ("Claude Code", "Claude Desktop", "VS Code", "Cursor"):
        assert f"**{client}**" in README
    kinds = ["servers" if "servers" in json.loads(block) else "mcpServers" for block in blocks("json")]
    assert kinds == ["mcpServers", "servers", "mcpServers", "servers", "mcpServers"]


def test_every_command_of_ours_in_the_readme_is_accepted() -> None:
    ours = [words[1:] for words in commands() if words[0] in PROJECT["scripts"]]
    ours += [words[words.index("--") + 2 :] for words in commands() if "--" in words]
    assert len(ours) >= 6
    assert [arguments for arguments in ours if not accepted(arguments)] == []


@pytest.mark.skipif(not HAS_MAKE, reason="needs make")
def test_every_make_target_that_is_named_exists() -> None:
    named = {"help", *re.findall(r"`make ([a-z]+)`", README)}
    named |= {words[1] for words in commands() if words[0] == "make"}
    named |= set(re.findall(r"make ([a-z ]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[0].split())
    assert {"demo", "test", "lint", "serve", "bench"} <= named
    for target in named:
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        for script in re.findall(r"python(?:\.exe)? ((?:\w+/)*\w+\.py)", planned.stdout):
            assert (ROOT / script).is_file(), script
        for module in re.findall(r"-m ((?:docs|benchmarks)[.\w]*)", planned.stdout):
            path = ROOT / Path(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("block", blocks("sql"))
def test_the_queries_of_the_readme_run_on_a_ledger(block: str, tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    try:
        reader = sqlite3.connect(f"file:{tmp_path / 'ledger.db'}?mode=ro", uri=True)
        for statement in filter(str.strip, block.split(";")):
            assert reader.execute(statement).description is not None
        reader.close()
    finally:
        ledger.close()


PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    path = ROOT / page
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_flags_in_the_readme_exist() -> None:
    flags = set(re.findall(r"`(--[a-z-]+)`", README))
    known = {"--" + name.replace("_", "-") for name in Settings.model_fields} | {"--version", "--help"}
    assert flags
    assert flags <= known


def test_the_version_is_in_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    versions = [v for v in re.findall(r"^## (\S+)", changes, re.MULTILINE) if v != "Unreleased"]
    assert versions[0] == PROJECT["version"]
