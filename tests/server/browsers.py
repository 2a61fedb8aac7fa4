"""A real browser for tests, and axe-core to look at pages with."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from tests.conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = ROOT / ".cache" / "axe" / "node_modules" / "axe-core" / "axe.min.js"

PAGES = {
    "facts": "/",
    "story": "/board/facts/e17",
    "sets": "/board/sets",
    "set": "/board/sets/capitals",
    "proposals": "/board/proposals",
    "proposal": "/board/proposals/p7",
    "model": "/board/model",
    "steering": "/board/steering",
    "maps": "/board/maps",
    "jobs": "/board/jobs",
    "report": "/board/report",
}
"""Every page of a board with many edits (tests.many_edits)."""
DEEP = (
    "/?page=300",
    "/?holds=no&page=2",
    "/?sort=subject&page=7",
    "/?set=capitals&page=9",
    "/?q=country+77",
    "/?batch=12",
    "/board/sets/capitals?state=differs&page=30",
    "/board/model?page=3",
    "/board/proposals?page=5",
    "/board/steering?page=3",
    "/board/maps?page=4",
    "/board/jobs?page=5",
)
"""Pages far back in long lists, and searches."""


def assert_open_to_all(person: Any, axe: str | None, name: str) -> None:
    """Fail on a serious finding of axe-core, where that can be had."""
    if axe is None:
        return
    # Through the debugger, as the page's own policy lets no foreign script in.
    person.context.new_cdp_session(person).send("Runtime.evaluate", {"expression": axe})
    found = person.evaluate("axe.run().then((r) => r.violations)")
    serious = [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]
    assert serious == [], (name, serious)


def axe_core() -> str | None:
    """The source of axe-core, fetched by npm once; None where it cannot be had."""
    if not AXE.exists() and (npm := shutil.which("npm")):
        AXE.parents[2].mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-save", "--silent", "--prefix", str(AXE.parents[2]), "axe-core@4"]
        subprocess.run(command, check=False, capture_output=True, timeout=120)
    return AXE.read_text("utf-8") if AXE.exists() else None
