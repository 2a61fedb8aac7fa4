"""What a token may call: tools beyond its scope are not listed to it, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ListToolsResult

import tools
from server.http.identity import Identity, Scope, identity_of
from tools._calls import caller


def scope_of(name: str) -> Scope:
    """What a token needs to call this tool."""
    found: Scope = tools.SCOPES.get(name, "admin")
    return found


def check(name: str, context: Context[Any, Any]) -> None:
    """Raise ToolError when the caller's token does not allow this tool."""
    identity = caller(context)
    if identity is None or identity.may(scope_of(name)):
        return
    raise ToolError(
        f"{name} needs a token with the scope {scope_of(name)!r}; that of {identity.name!r} has "
        f"{' and '.join(sorted(identity.scopes))}. Nothing was changed. Whoever runs this server can give it more."
    )


async def hide(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Middleware: list only the tools that the caller's token allows."""
    result = await call_next(ctx)
    identity = identity_of(getattr(ctx.request, "scope", None))
    if ctx.method != "tools/list" or identity is None:
        return result
    if isinstance(result, ListToolsResult):
        return result.model_copy(update={"tools": [t for t in result.tools if _allowed(t.name, identity)]})
    if isinstance(result, Mapping) and isinstance(result.get("tools"), list):
        return {**result, "tools": [t for t in result["tools"] if _allowed(t["name"], identity)]}
    return result


def _allowed(name: str, identity: Identity) -> bool:
    return identity.may(scope_of(name))
