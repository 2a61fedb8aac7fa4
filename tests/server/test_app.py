"""The composition: what is built, what is not loaded for it, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from errata import build, main
from server.settings import Settings
from tests.server.processes import ROOT

HEAVY = {"torch", "transformers", "sqlite_utils", "numpy", "peft", "store.ledger"}


def test_starting_imports_nothing_heavy() -> None:
    # In a process of its own: this one has imported everything already.
    code = (
        "import sys; from errata import build; from server.settings import Settings; "
        f"build(Settings()); print(*({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_building_touches_no_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    build(Settings(home=home))
    assert not home.exists()


def test_the_script_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "server.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in ("--model", "--home", "--transport", "--read-only", "--toolsets"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--toolsets", "inspct"], "'inspct'"),
        (["--transport", "pigeon"], "pigeon"),
        (["--transport", "http", "--host", "0.0.0.0"], "ERRATA_TOKEN"),
    ],
)
def test_a_wrong_command_line_is_explained(
    line: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 2
    assert says in capsys.readouterr().err
