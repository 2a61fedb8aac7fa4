"""A function fits on a screen, and a file in one's head: what CONTRIBUTING asks for, counted."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.one_apply import counted

ROOT = Path(__file__).parent.parent
CODE = [
    ROOT / "errata.py",
    *(p for d in ("server", "tools", "editors", "store") for p in (ROOT / d).rglob("*.py")),
]
MOST_IN_A_BODY = 40
"""Lines of a function's body; its signature and docstring, which a tool's schema is made of, come on top."""
MOST_IN_A_FILE = 320
MOST_FILES, MOST_CROSSINGS = 110, 100
"""Of one apply by ROME, as tests/one_apply.py counts them: 100 and 87 when this was written."""
LONGER = {"server/engines/pushing.py: push"}


def body_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_the_body_of_a_function_fits_on_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_of(node) > MOST_IN_A_BODY
    }
    assert long <= LONGER, "divide these, with names that say what is in them"


def test_a_file_has_about_three_hundred_lines_at_most() -> None:
    long = [p.relative_to(ROOT) for p in CODE if len(p.read_text("utf-8").splitlines()) > MOST_IN_A_FILE]
    assert not long, "divide these by what they are about"


def test_one_apply_takes_part_in_no_more_files_and_crosses_layers_no_more_often() -> None:
    seen = counted("rome")
    assert len(seen.files) <= MOST_FILES
    assert seen.crossings.total() <= MOST_CROSSINGS
