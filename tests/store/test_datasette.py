"""Datasette itself opens a ledger with the metadata.

Needs `datasette` on the path, or its place in the environment variable DATASETTE; skipped without.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.many_edits import fill_beside, hostile

DATASETTE = os.environ.get("DATASETTE") or shutil.which("datasette")
pytestmark = pytest.mark.skipif(DATASETTE is None, reason="needs datasette (pipx install datasette)")
EVIL = "<script>alert(1)</script>"


def got(home: Path, path: str) -> str:
    command = [str(DATASETTE), "-i", str(home / "ledger.db"), "-m", str(ROOT / "store" / "datasette.json")]
    done = subprocess.run([*command, "--get", path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_datasette_opens_on_the_views_and_runs_every_query(tmp_path: Path) -> None:
    home = fill_beside(hostile(tmp_path, EVIL), 20, 5)
    ledger: dict[str, Any] = json.loads(got(home, "/ledger.json"))
    shown = {table["name"] for table in ledger["tables"] if not table["hidden"]} | {
        view["name"] for view in ledger["views"]
    }
    assert {"facts", "history", "damage", "proposals", "jobs", "fact_sets"} == shown
    for query in ("does_not_hold", "waiting", "cost"):
        assert json.loads(got(home, f"/ledger/{query}.json?_shape=array")), query
    page = got(home, "/ledger/facts")
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "Every correction: what was asked" in page
