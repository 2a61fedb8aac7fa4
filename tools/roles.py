"""What a token may call: tools beyond its scope are not listed to it, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ListToolsResult

import tools
from server.http.identity import Identity, Scope, identity_of
from tools._calls import caller


def scope_of(name: str, approval: bool = False) -> Scope:
    """What a token needs to call this tool; with `approval`, only admin changes the model at once."""
    found: Scope = tools.SCOPES.get(name, "admin")
    return "admin" if approval and found == "edit" else found


def check(name: str, context: Context[Any, Any], approval: bool = False) -> None:
    """Raise ToolError when the caller's token does not allow this tool."""
    identity = caller(context)
    waits = approval and scope_of(name) == "edit"
    if identity.may(scope_of(name, approval)) if identity is not None else not waits:
        return
    if waits:
        raise ToolError(
            f"{name} is not carried out at once: this server runs with --approval. Nothing was changed. Call "
            "propose_edits with the right answers; a person decides on the board."
        )
    assert identity is not None
    raise ToolError(
        f"{name} needs a token with the scope {scope_of(name)!r}; that of {identity.name!r} has "
        f"{' and '.join(sorted(identity.scopes))}. Nothing was changed. Whoever runs this server can give it more."
    )


def hiding(approval: bool) -> ServerMiddleware[Any]:
    """Middleware: list only the tools that the caller's token allows."""

    def allowed(name: str, identity: Identity | None) -> bool:
        if identity is None:
            return not (approval and scope_of(name) == "edit")
        return identity.may(scope_of(name, approval))

    async def hide(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        result = await call_next(ctx)
        identity = identity_of(getattr(ctx.request, "scope", None))
        if ctx.method != "tools/list" or (identity is None and not approval):
            return result
        if isinstance(result, ListToolsResult):
            return result.model_copy(update={"tools": [t for t in result.tools if allowed(t.name, identity)]})
        if isinstance(result, Mapping) and isinstance(result.get("tools"), list):
            return {**result, "tools": [t for t in result["tools"] if allowed(t["name"], identity)]}
        return result

    return hide
