"""Shows the MCP App in the view of a published host, AppRenderer of @mcp-ui/client, in Chromium, and presses buttons.

    python -m tests.conformance.app_host MODEL

`make conformance` runs it. It needs npm, playwright and Chromium; without one of them it says so and does nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.server.browsers import CHROMIUM
from tests.server.opened import STRONG
from tests.server.processes import Agent, agent_of, arguments, free_port, listening
from tests.tools.test_app import POLICY, SANDBOX, pages

HERE = Path(__file__).parent
PROGRAMS = HERE.parent.parent / ".cache" / "app-host"
PACKAGES = (
    "@mcp-ui/client@7.1.1",
    "@modelcontextprotocol/sdk@1.32.2",
    "react@19.3.1",
    "react-dom@19.3.1",
    "esbuild@0.28.2",
)
PAGE = """<!doctype html><title>host</title><link rel="icon" href="data:,">
<style>body{margin:0}iframe{border:0;min-height:400px}</style>
<body><div id="root"></div><script src="/host.js"></script></body>"""
FACT = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
WIDTHS = (390, 1280)


def main(model: str) -> int:
    """Returns the exit status."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("skipped: needs playwright")
        return 0
    npm = shutil.which("npm")
    if CHROMIUM is None or npm is None:
        print("skipped: needs npm and chromium")
        return 0
    port, script = free_port(), bundled(npm)
    with (
        TemporaryDirectory() as home,
        pages({"/": PAGE, "/host.js": script}) as outside,
        pages({"/": SANDBOX}, POLICY) as sandbox,
        sync_playwright() as running,
    ):
        options = {"transport": "http", "port": port, "toolsets": "inspect,edit,locate,ledger,people"}
        command = arguments(Path(home), model=model, allowed_origins=outside, **options)
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with listening(*command, url=f"http://127.0.0.1:{port}") as url, agent_of(url) as agent:
            for width in WIDTHS:
                page = browser.new_context(viewport={"width": width, "height": 700}).new_page()
                page.goto(outside)
                page.evaluate("(url) => window.reach(url)", f"{url}/mcp")
                tried(page, sandbox, agent)
    return 0


def tried(page: Any, sandbox: str, agent: Agent) -> None:
    """A proposal is approved, undone and redone by the app's buttons; an audit and a trace are shown."""

    def show(tool: str, theme: str = "light", **given: Any) -> None:
        page.evaluate("(given) => window.show(...given)", [tool, given, sandbox, theme])

    def active() -> int:
        return len(agent("list_edits", status="active")["edits"])

    view = page.frame_locator("iframe").frame_locator("iframe")
    show("propose_edits", edits=[FACT], method="rome", params=STRONG, guard={"off": ["all"]}, replace=True)
    view.get_by_text("A correction waits for you").wait_for()
    for press, then, expected in (("Approve", "Undo", 1), ("Undo", "Redo", 0), ("Redo", "Undo", 1)):
        view.get_by_role("button", name=press).click()
        view.get_by_role("button", name=then).wait_for()
        assert active() == expected, press
    show("audit_edits", theme="dark")
    view.get_by_role("heading", name="Audit").wait_for()
    show("locate_fact", **FACT)
    view.get_by_role("heading", name="Where the fact is kept").wait_for()
    view.get_by_role("img").wait_for()
    assert page.evaluate("window.size.height") > 100
    assert page.evaluate("window.problems") == []


def bundled(npm: str) -> str:
    """The host's page script, made of app_host.jsx and what it imports, fetched once."""
    source, made = PROGRAMS / "app_host.jsx", PROGRAMS / "app_host.js"
    esbuild = PROGRAMS / "node_modules" / ".bin" / "esbuild"
    if not esbuild.exists():
        PROGRAMS.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--no-save", "--silent", "--prefix", str(PROGRAMS), *PACKAGES]
        subprocess.run(install, check=True, capture_output=True, timeout=600)
    source.write_text((HERE / "app_host.jsx").read_text("utf-8"), "utf-8")
    production = '--define:process.env.NODE_ENV="production"'
    command = [str(esbuild), str(source), "--bundle", "--format=iife", production, f"--outfile={made}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return made.read_text("utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
