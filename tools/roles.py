"""What a token may call: tools and prompts beyond its scope are not listed to it, and refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, ListPromptsResult, ListToolsResult

import tools
from server.http.identity import Identity, Scope, identity_of
from tools._calls import caller
from tools._confirming import asks_a_person, can_ask
from tools.prompts import NEEDS


def scope_of(name: str, approval: bool = False) -> Scope:
    """What a token needs to call this tool; with `approval`, only admin changes the model at once."""
    found: Scope = tools.SCOPES.get(name, "admin")
    return "admin" if approval and found == "edit" else found


def check(name: str, context: Context[Any, Any], approval: bool = False) -> None:
    """Raise ToolError when the caller's token does not allow this tool."""
    identity = caller(context)
    waits = approval and scope_of(name) == "edit"
    if allowed(name, identity, approval, can_ask(context)):
        return
    if waits and name == DECIDING:
        raise ToolError(
            "decide_proposal is for a person here: this server runs with --approval, and your client cannot ask its "
            "person. Nothing was decided. A person decides with errata-mcp decide at the command line, or on the board."
        )
    if waits:
        raise ToolError(
            f"{name} is not carried out at once: this server runs with --approval. Nothing was changed. Call "
            "propose_edits with the right answers; a person decides."
        )
    assert identity is not None
    raise ToolError(
        f"{name} needs a token with the scope {scope_of(name)!r}; that of {identity.name!r} has "
        f"{' and '.join(sorted(identity.scopes))}. Nothing was changed. Whoever runs this server can give it more."
    )


def allowed(name: str, identity: Identity | None, approval: bool = False, asks: bool = False) -> bool:
    """Whether this caller may call the tool; None is one without a token, on a server that asks for none.

    `asks`: its client can ask the person, who then decides (`tools._confirming`).
    """
    if identity is None:
        return not (approval and scope_of(name) == "edit") or (name == DECIDING and asks)
    return identity.may(scope_of(name, approval))


def prompt_allowed(name: str, identity: Identity | None, approval: bool = False) -> bool:
    """Whether this caller may call every tool that the prompt cannot do without."""
    return all(allowed(tool, identity, approval) for tool in NEEDS.get(name, ()))


def check_prompt_scope(name: str, context: Context[Any, Any] | None, approval: bool = False) -> None:
    """Raise MCPError, code -32602, for a prompt whose tools the caller may not call."""
    identity = None if context is None else caller(context)
    if prompt_allowed(name, identity, approval):
        return
    beyond = sorted(tool for tool in NEEDS[name] if not allowed(tool, identity, approval))
    raise MCPError(
        INVALID_PARAMS,
        f"The prompt {name} works with {', '.join(beyond)}, which your token does not allow here. "
        "prompts/list has those that it does.",
    )


def hiding(approval: bool) -> ServerMiddleware[Any]:
    """Middleware: list only the tools and prompts that the caller's token allows."""

    async def hide(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        result = await call_next(ctx)
        identity = identity_of(getattr(ctx.request, "scope", None))
        asks = asks_a_person(ctx.session.client_capabilities)
        if ctx.method not in _LISTED or (identity is None and not approval):
            return result
        field = _LISTED[ctx.method]

        def fits(name: str) -> bool:
            if field == "prompts":
                return prompt_allowed(name, identity, approval)
            return allowed(name, identity, approval, asks)

        if isinstance(result, ListToolsResult | ListPromptsResult):
            kept = [item for item in getattr(result, field) if fits(item.name)]
            return result.model_copy(update={field: kept})
        if isinstance(result, Mapping) and isinstance(result.get(field), list):
            return {
                **result,
                field: [item for item in result[field] if fits(item["name"])],
            }
        return result

    return hide


_LISTED = {"tools/list": "tools", "prompts/list": "prompts"}
"""Requests that list what callers may use, and the field of the result."""
DECIDING = "decide_proposal"
