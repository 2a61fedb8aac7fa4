"""The MCP App: declared as the specification says, and shown by the reference host's own bridge in a real browser.

The browser's part needs npm, playwright and Chromium; it is skipped without.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from server.settings import OPTIONAL_TOOLSETS, TOOLSETS
from tests.conftest import ROOT
from tests.families import save_to
from tests.server.browsers import CHROMIUM, axe_core
from tests.server.opened import STRONG
from tests.server.processes import agent_of, arguments, free_port, listening
from tests.tools.clients import Connect
from tools.app import SHOWN, URI

MIME = "text/html;profile=mcp-app"
EVIL = "<img src=x onerror=alert(1)>"
HOST = """
import { AppBridge, PostMessageTransport, RESOURCE_MIME_TYPE, getToolUiResourceUri }
  from "@modelcontextprotocol/ext-apps/app-bridge";
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
let client, tools;
const about = { name: "host", version: "1" };
window.reach = async (url) => {
  client = new Client(about);
  await client.connect(new StreamableHTTPClientTransport(new URL(url)));
  tools = new Map((await client.listTools()).tools.map((tool) => [tool.name, tool]));
};
window.begin = (name, args) => { window.result = client.callTool({ name, arguments: args }); };
window.show = async (name, sandbox, theme) => {
  const result = await window.result;
  const [content] = (await client.readResource({ uri: getToolUiResourceUri(tools.get(name)) })).contents;
  if (content.mimeType !== RESOURCE_MIME_TYPE) throw new Error(content.mimeType);
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts allow-same-origin");
  const loaded = new Promise((resolve) => addEventListener("message", function heard(event) {
    if (event.source !== frame.contentWindow || event.data.method !== "ui/notifications/sandbox-proxy-ready") return;
    removeEventListener("message", heard);
    resolve();
  }));
  frame.src = sandbox;
  document.body.replaceChildren(frame);
  await loaded;
  const bridge = new AppBridge(client, about, { serverTools: {}, serverResources: {} },
    { hostContext: { theme, toolInfo: { tool: tools.get(name) } } });
  const ready = new Promise((resolve) => { bridge.oninitialized = resolve; });
  bridge.onsizechange = ({ width, height }) => { frame.style.height = `${height}px`; window.size = [width, height]; };
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  await bridge.sendSandboxResourceReady({ html: content.text });
  await ready;
  await bridge.sendToolInput({ arguments: {} });
  await bridge.sendToolResult(result);
};
"""
"""A host in a page: the reference client and bridge from npm, on a real server."""
PAGE = """<!doctype html><title>host</title><link rel="icon" href="data:,">
<style>body{margin:0}iframe{border:0;width:100%;height:300px}</style>
<script src="/host.js"></script><body></body>"""
SANDBOX = """<!doctype html><title>sandbox</title><style>body{margin:0}iframe{border:0;width:100%;height:98vh}</style>
<body><script>
const ready = { jsonrpc: "2.0", method: "ui/notifications/sandbox-proxy-ready", params: {} };
let inner;
addEventListener("message", (event) => {
  if (event.source === parent && event.data.method === "ui/notifications/sandbox-resource-ready") {
    inner = document.createElement("iframe");
    inner.setAttribute("sandbox", "allow-scripts");
    inner.srcdoc = event.data.params.html;
    document.body.replaceChildren(inner);
  } else if (event.source === parent && inner) inner.contentWindow.postMessage(event.data, "*");
  else if (inner && event.source === inner.contentWindow) parent.postMessage(event.data, "*");
});
parent.postMessage(ready, "*");
</script></body>"""
"""What keeps the app apart from its host, as the specification describes it: it makes the frame and passes messages."""
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'none'; frame-src 'self'; base-uri 'none'"
)
"""What a host lets an app do that asks for nothing."""


@contextmanager
def pages(files: dict[str, str], policy: str | None = None) -> Iterator[str]:
    """Serve some files; the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = files.get(self.path)
            self.send_response(404 if text is None else 200)
            kind = "text/javascript" if self.path.endswith(".js") else "text/html"
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            if policy:
                self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


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
    bundle = folder / f"host-{hashlib.sha256(HOST.encode()).hexdigest()[:12]}.js"
    if not bundle.exists():
        (folder / "host.js").write_text(HOST, "utf-8")
        wanted = (
            "@modelcontextprotocol/ext-apps@2",
            "@modelcontextprotocol/client@2",
            "zod@4",
            "esbuild@0.25",
        )
        install = [npm, "install", "--no-save", "--silent", "--prefix", str(folder), *wanted]
        done = subprocess.run(install, capture_output=True, timeout=240)
        esbuild = folder / "node_modules" / ".bin" / "esbuild"
        if done.returncode or not esbuild.exists():
            pytest.skip("the reference host cannot be fetched")
        command = [str(esbuild), str(folder / "host.js"), "--bundle", "--format=iife", f"--outfile={bundle}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return bundle.read_text("utf-8")


EDIT = {"subject": f"France {EVIL}", "prompt": "The capital of {} is", "target": "Rome"}
GUARD = {"off": ["all"]}


class Host:
    """The host's page, and the app in it."""

    def __init__(self, page: Any, sandbox: str) -> None:
        self.page, self._sandbox = page, sandbox
        self.view = page.frame_locator("iframe").frame_locator("iframe")

    def call(self, tool: str, theme: str = "light", **given: Any) -> None:
        """Let the agent call a tool, and show its result in the app."""
        self.page.evaluate("([tool, given]) => window.begin(tool, given)", [tool, given])
        self.page.evaluate("([...given]) => window.show(...given)", [tool, self._sandbox, theme])

    def look(self, axe: str | None, name: str) -> None:
        """Keep a picture, and fail on a serious finding of axe-core or where the app is wider than its frame."""
        inner = self.page.frames[-1]
        assert inner.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        if axe is not None:
            inner.evaluate(axe)
            found = inner.evaluate("axe.run().then((r) => r.violations)")
            assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], name
        if folder := os.environ.get("BOARD_SHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"app-{name}.png"))


@pytest.fixture
def in_a_browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_a_host_of_npm_shows_what_tools_of_a_real_server_answer_and_its_buttons_act(
    host: str, in_a_browser: Any, tmp_path: Path
) -> None:
    port, wrong = free_port(), list[str]()
    context = in_a_browser.new_context(viewport={"width": 390, "height": 500})
    page = context.new_page()
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    with pages({"/": PAGE, "/host.js": host}) as outside, pages({"/": SANDBOX}, POLICY) as sandbox:
        command = arguments(
            tmp_path / "home", model=save_to("llama", tmp_path / "model"), transport="http", port=port,
            toolsets="inspect,edit,locate,ledger,people", allowed_origins=outside,
        )  # fmt: skip
        with listening(*command, url=f"http://127.0.0.1:{port}") as url, agent_of(url) as agent:
            page.goto(outside)
            page.evaluate("(url) => window.reach(url)", f"{url}/mcp")
            shown, axe = Host(page, sandbox), axe_core()
            proposal = {"edits": [EDIT], "method": "rome", "params": STRONG, "guard": GUARD, "reason": EVIL}
            shown.call("propose_edits", **proposal)
            shown.view.get_by_text("A correction waits for you").wait_for()
            assert EVIL in shown.view.locator("#view").inner_text()
            shown.look(axe, "proposal")
            shown.view.get_by_role("button", name="Approve").click()
            shown.view.get_by_role("button", name="Undo").wait_for()
            assert [e["edit_id"] for e in agent("list_edits", status="active")["edits"]] == ["e1"]
            shown.look(axe, "approved")
            shown.view.get_by_role("button", name="Undo").click()
            shown.view.get_by_role("button", name="Redo").wait_for()
            assert agent("list_edits", status="active")["edits"] == []
            shown.view.get_by_role("button", name="Redo").click()
            shown.view.get_by_role("button", name="Undo").wait_for()
            assert [e["edit_id"] for e in agent("list_edits", status="active")["edits"]] == ["e1"]
            shown.call("propose_edits", **proposal, replace=True)
            shown.view.get_by_text("p2 waits for a decision").wait_for()
            agent("decide_proposal", proposal_id="p2", decision="decline")
            shown.view.get_by_role("button", name="Approve").click()
            shown.view.get_by_text("p2 is declined already").wait_for()
            assert shown.view.get_by_role("button", name="Decline").is_enabled()
            shown.look(axe, "refused")
            shown.call("audit_edits", theme="dark")
            shown.view.get_by_role("heading", name="Audit").wait_for()
            shown.look(axe, "audit")
            shown.call("locate_fact", subject="France", prompt="The capital of {} is", target="Rome")
            shown.view.get_by_role("heading", name="Where the fact is kept").wait_for()
            shown.view.get_by_role("img").wait_for()
            shown.look(axe, "trace")
            assert page.evaluate("window.size[1]") > 100
            assert wrong == []
