"""The MCP App: declared as the specification says, and shown by the reference host's own bridge in a real browser.

The browser's part needs npm, playwright and Chromium; it is skipped without.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from server.settings import OPTIONAL_TOOLSETS, TOOLSETS
from tests.conftest import ROOT
from tests.tools.clients import Connect
from tools.app import SHOWN, URI

MIME = "text/html;profile=mcp-app"
EVIL = "<img src=x onerror=alert(1)>"
HOST = """
import { AppBridge, PostMessageTransport } from "@modelcontextprotocol/ext-apps/app-bridge";
window.start = async (html, result) => {
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts");
  frame.srcdoc = html;
  window.calls = []; window.sizes = [];
  const bridge = new AppBridge(null, { name: "host", version: "1" }, { serverTools: {} },
    { hostContext: { theme: "dark" } });
  const ready = new Promise((resolve) => { bridge.oninitialized = resolve; });
  bridge.onsizechange = (params) => window.sizes.push(params);
  bridge.oncalltool = async (params) => { window.calls.push(params); return window.answer; };
  document.body.append(frame);
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  await ready;
  await bridge.sendToolInput({ arguments: {} });
  await bridge.sendToolResult(result);
};
"""


@pytest.mark.anyio
async def test_the_app_is_declared_and_can_be_read(connect: Connect, mode: str) -> None:
    async with connect(toolsets=(*TOOLSETS, *OPTIONAL_TOOLSETS)) as client:
        await declared(client, mode)


async def declared(client: Client, mode: str) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    for name, tool in tools.items():
        assert (tool.meta or {}).get("ui") == ({"resourceUri": URI} if name in SHOWN else None), name
    assert set(tools) >= SHOWN
    (content,) = (await client.read_resource(URI)).contents
    assert content.mime_type == MIME
    html = content.text  # type: ignore[union-attr]
    assert "http://" not in html
    assert "https://" not in html
    assert "innerHTML" not in html
    if mode == "auto":  # the handshake of earlier protocols has no place for it
        assert "io.modelcontextprotocol/ui" in (client.server_capabilities.extensions or {})


@pytest.fixture(scope="module")
def host() -> str:
    """A page with the reference host's bridge, bundled."""
    npm, folder = shutil.which("npm"), ROOT / ".cache" / "ext-apps"
    if npm is None:
        pytest.skip("needs npm")
    folder.mkdir(parents=True, exist_ok=True)
    bundle = folder / "host.bundle.js"
    if not bundle.exists():
        (folder / "host.js").write_text(HOST, "utf-8")
        wanted = ("@modelcontextprotocol/ext-apps@2", "@modelcontextprotocol/sdk@1", "zod@4", "esbuild@0.25")
        install = [npm, "install", "--no-save", "--silent", "--prefix", str(folder), *wanted]
        done = subprocess.run(install, capture_output=True, timeout=240)
        esbuild = folder / "node_modules" / ".bin" / "esbuild"
        if done.returncode or not esbuild.exists():
            pytest.skip("the reference host cannot be fetched")
        command = [str(esbuild), str(folder / "host.js"), "--bundle", "--format=iife", f"--outfile={bundle}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return bundle.read_text("utf-8")


RESULT = {
    "edit_id": "e1",
    "prompt": "The capital of France is",
    "target": "Rome",
    "before": EVIL,
    "after": "Rome",
    "reliability": 1.0,
    "forms": {"chat": 0.5},
}
WAITING: dict[str, Any] = {
    "content": [{"type": "text", "text": "p1 waits"}],
    "structuredContent": {
        "proposal_id": "p1",
        "state": "waiting",
        "message": "p1 waits for a decision.",
        "edit_ids": [],
        "report": {
            "summary": "1 of 1 edits are said",
            "results": [RESULT],
            "failed_guard": [],
            "changed": [],
        },
    },
}
APPROVED = {
    "content": [{"type": "text", "text": "p1 is approved"}],
    "structuredContent": {
        "proposal_id": "p1",
        "state": "approved",
        "message": "p1 is approved.",
        "edit_ids": ["e1"],
    },
}


@pytest.mark.slow
def test_the_reference_host_shows_a_proposal_approves_it_and_undoes_it(host: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium")
    page_file = tmp_path / "host.html"
    page_file.write_text("<!doctype html><body></body>", "utf-8")
    html = (ROOT / "tools" / "app.html").read_text("utf-8")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, wrong = browser.new_page(viewport={"width": 700, "height": 500}), []
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(page_file.as_uri())
        page.add_script_tag(content=host)
        page.evaluate("(answer) => { window.answer = answer; }", APPROVED)
        page.evaluate("([html, result]) => window.start(html, result)", [html, WAITING])
        view = page.frame_locator("iframe")
        view.get_by_text("A correction waits for you").wait_for()
        assert EVIL in view.locator("#view").inner_text()
        assert view.locator("img").count() == 0
        view.get_by_role("button", name="Approve").click()
        view.get_by_role("button", name="Undo").wait_for()
        view.get_by_role("button", name="Undo").click()
        page.wait_for_function("window.calls.length === 2")
        assert json.loads(page.evaluate("JSON.stringify(window.calls)")) == [
            {"name": "decide_proposal", "arguments": {"proposal_id": "p1", "decision": "approve"}},
            {"name": "revert_edits", "arguments": {"edit_ids": ["e1"]}},
        ]
        assert page.evaluate("window.sizes.length") > 0
        assert wrong == []
        browser.close()
