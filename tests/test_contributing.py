"""CONTRIBUTING.md says what is so: its commands, targets, files and the example of constants are tried."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SHELL = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]
INLINE = re.findall(r"`([^`\n]+)`", TEXT)
COMMANDS = sorted({c for c in (*SHELL, *INLINE) if c.startswith("python -m ")})


def test_every_make_target_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = {m for c in (*SHELL, *INLINE) for m in re.findall(r"^make (\w+)", c)}
    assert named >= {"setup", "demo", "test", "lint", "format", "conformance", "docs"}
    assert {name for name in named if not re.search(rf"^{name}:", makefile, re.M)} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_it_is_given(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *given = shlex.split(command.removeprefix("python -m ").replace("...", ""))
    if module == "editors.constants":  # no options; test_constants.py reads its table
        assert given == []
        return
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    assert ended.value.code == 0
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in given if word.startswith("--")} <= options


def test_every_file_and_folder_it_names_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", TEXT)
    named = [
        name
        for name in INLINE
        if re.fullmatch(r"[\w./-]+(/|\.py|\.md)", name) and name != "docs/constants.md"
    ]
    assert len(named) > 10
    assert [name for name in (*linked, *named) if not (ROOT / name).exists()] == []


def test_what_it_says_of_the_tests_options_is_so(request: pytest.FixtureRequest) -> None:
    assert "pytest --device cuda" in TEXT
    assert request.config.getoption("--device")
    assert "TORTURE_SEED=7 pytest tests/torture" in TEXT
    assert any(
        "TORTURE_SEED" in path.read_text("utf-8") for path in (ROOT / "tests" / "torture").glob("*.py")
    )


def test_the_example_of_constants_declares_them(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "example.py").write_text(example, "utf-8")
    ask = "import example; from editors.constants import declared; print(*(f'{c.name}={c.origin}' for c in declared()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    ran = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["SLACK=tuned", "RIDGE=published", "STEPS=assumed", "MOST=limit"], ran.stderr
