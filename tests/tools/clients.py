"""Short ways to call a tool and look at its answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from mcp import Client

Connect = Callable[..., AbstractAsyncContextManager[Client]]


async def told(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """What a tool answers; fails when it is an error."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert isinstance(result.structured_content, dict)
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """The text of a tool's refusal; fails when it is none, or only an internal error."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    (block,) = result.content
    text = getattr(block, "text", "")
    assert "internal error" not in text, text
    return str(text)
