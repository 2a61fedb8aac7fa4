"""The MCP App: a view of reports, audits, traces and proposals inside the conversation, for hosts that can show it.

Hosts without it show the text and the pictures of the results as before. Extension `io.modelcontextprotocol/ui`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from mcp.server.apps import Apps

URI = "ui://errata/result.html"
SHOWN = frozenset(
    {
        "preview_edits",
        "apply_edits",
        "revert_edits",
        "reapply_edits",
        "audit_edits",
        "locate_fact",
        "propose_edits",
        "decide_proposal",
    }
)
"""The tools whose results the app shows."""


def meta_of(name: str) -> dict[str, Any] | None:
    """What tells a host that a tool's result has a view; None where it has none."""
    return {"ui": {"resourceUri": URI}} if name in SHOWN else None


def apps() -> Apps:
    """The extension with the one resource. It loads nothing from elsewhere, so it asks for no domain."""
    extension = Apps()
    html = resources.files("tools").joinpath("app.html").read_text("utf-8")
    extension.add_html_resource(
        URI,
        html,
        name="result",
        title="Errata",
        description="Shows a report, an audit, a trace or a proposal, with buttons to approve and to undo.",
        prefers_border=False,
    )
    return extension
