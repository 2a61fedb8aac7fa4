"""Completes edit ids and method names in resource addresses and prompt arguments."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp_types import (
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

from server.startup import Startup

MOST = 100
"""The protocol's limit on values in one answer."""


def add_completions(server: MCPServer[Any], startup: Startup) -> None:
    """Register the completion handler on `server`."""

    @server.completion()  # type: ignore[no-untyped-call,untyped-decorator]
    async def complete(
        _ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        _context: CompletionContext | None,
    ) -> Completion | None:
        known = await anyio.to_thread.run_sync(_known, startup, argument.name)
        # A list of ids is completed at its last entry.
        head, comma, last = argument.value.rpartition(",")
        matching = [f"{head}{comma}{v}" for v in known if v.startswith(last.strip())]
        return Completion(values=matching[:MOST], total=len(matching), has_more=len(matching) > MOST)


def _known(startup: Startup, argument: str) -> list[str]:
    """What the argument can be; nothing while the model loads, since completion must be quick."""
    services = startup.ready()
    if services is None:
        return []
    match argument:
        case "edit_id" | "edit_ids":
            return [row.edit_id for row in services.history.list_edits(limit=200).edits]
        case "name" | "method":
            return [method.name for method in services.edits.methods().methods]
        case _:
            return []
