"""docs/serving.md: what stands there works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engines.settings import read_engines
from server.settings import Settings
from tests import device
from tests.conftest import ROOT
from tests.families import save_to
from tests.server.test_openai import Served

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    model = str(save_to("llama", folder / "tiny"))
    settings = Settings(
        model=model, home=folder / "home", threads=1, device=device.chosen, dtype="float32", transport="http"
    )
    with Served(settings) as served:
        yield served


def test_every_engine_of_the_page_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    tables = "\n".join(blocks("toml"))
    for folder in set(re.findall(r'folder = "(/srv[^"]*)"', tables)):
        there = tmp_path / folder.strip("/")
        there.mkdir(parents=True, exist_ok=True)
        tables = tables.replace(f'"{folder}"', f'"{there}"')
    file = tmp_path / "engines.toml"
    file.write_text(tables, "utf-8")
    kinds = {engine.kind for engine in read_engines(file).values()}
    assert kinds == {"llamacpp", "ollama", "vllm_lora", "vllm_weights", "sglang_lora", "folder", "hub"}


def test_the_server_takes_the_flags_of_the_page() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("errata ")]
    for command in commands:
        flags = re.findall(r"--[a-z-]+", command)
        help_text = subprocess.run(
            [sys.executable, str(ROOT / "server.py"), "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert all(flag in help_text for flag in flags)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command_of_the_page_is_answered(served: Served) -> None:
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    command = command.replace("http://127.0.0.1:8765/v1", served.url)
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert '"chat.completion"' in answer.stdout


def test_the_python_program_of_the_page_compares_both_models(served: Served) -> None:
    (program,) = blocks("python")
    program = program.replace("http://127.0.0.1:8765/v1", served.url)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split(" ")[0] for line in ran.stdout.splitlines()][:1] == ["errata"]
    assert "errata:base" in ran.stdout
