"""docs/serving.md: what stands there works."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def section(engine: str) -> tuple[dict[str, Any], list[list[str]]]:
    """The first settings of an engine on the page, and its commands as words."""
    text = PAGE.split(f"\n### {engine}\n")[1].split("\n### ")[0]
    settings, commands = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("toml", "sh"))
    lines = commands.replace("\\\n", " ").splitlines()
    return tomllib.loads(settings)["engine"][0], [shlex.split(line) for line in lines]


def asked(engine: str, url: str) -> list[str]:
    """The page's command that asks an engine, at another address."""
    settings, (*_, ask) = section(engine)
    return [word.replace(settings["url"], url) for word in ask]


@pytest.mark.parametrize(
    ("engine", "starts"),
    [
        ("llama.cpp", "llama-server"),
        ("Ollama", "ollama"),
        ("vLLM", "vllm"),
        ("SGLang", "sglang.launch_server"),
    ],
)
def test_the_three_commands_of_an_engine_agree_with_its_settings(engine: str, starts: str) -> None:
    settings, commands = section(engine)
    start, errata, ask = commands
    assert starts in start
    assert errata[0] == "errata"
    assert errata[-2:] == ["--engines", "engines.toml"]
    assert ask[0] == "curl"
    (address,) = [word for word in ask if word.startswith("http")]
    assert address.startswith(settings["url"] + "/")
    body = json.loads(ask[ask.index("-d") + 1])
    named = body.get("model", body.get("lora_path"))
    options = dict(itertools.pairwise(start))
    if engine == "llama.cpp":
        assert options["--lora"] == f"{settings['folder']}/errata.gguf"
        assert settings["url"].endswith(f":{options['--port']}")
    elif engine == "Ollama":
        assert options["pull"] == settings["model"]
        assert named == settings["adapter"]
    else:
        assert int(options["--max-lora-rank"]) == settings["max_rank"]
        assert named == settings.get("adapter", "errata")
    if engine == "vLLM":
        assert options["serve"] == settings["model"] == errata[errata.index("--model") + 1]


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
