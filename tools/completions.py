"""Completes edit ids, job ids and method names in resource addresses and prompt arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)

from server.startup import Startup
from tools._errors import did_you_mean, middle

if TYPE_CHECKING:
    from server.services import Services

MOST = 100
"""The protocol's limit on values in one answer."""
PAGE = 200
PAGES = 5

_Values = Callable[["Services"], list[str]]


def _edits(services: Services) -> list[str]:
    return _ids(services, None)


def _active_edits(services: Services) -> list[str]:
    return _ids(services, "active")


def _ids(services: Services, status: str | None) -> list[str]:
    """The newest edits, a few pages of them."""
    ids: list[str] = []
    cursor = None
    for _ in range(PAGES):
        page = services.history.list_edits(status=status, limit=PAGE, cursor=cursor)
        ids += [row.edit_id for row in page.edits]
        if (cursor := page.next_cursor) is None:
            break
    return ids


def _methods(services: Services) -> list[str]:
    return [method.name for method in services.edits.methods().methods]


def _jobs(services: Services) -> list[str]:
    return [job.job_id for job in services.jobs.list(None, PAGE).jobs]


VALUES: dict[tuple[str, str], _Values] = {
    ("errata://edits/{edit_id}", "edit_id"): _edits,
    ("errata://methods/{name}", "name"): _methods,
    ("errata://jobs/{job_id}", "job_id"): _jobs,
    ("audit_edits", "edit_ids"): _active_edits,
    ("undo_last_change", "edit_id"): _active_edits,
}
"""What an argument can be, by what it belongs to: a resource template or a prompt."""


def add_completions(server: MCPServer[Any], startup: Startup) -> None:
    """Register the completion handler on `server`."""

    @server.completion()  # type: ignore[no-untyped-call,untyped-decorator]
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        _context: CompletionContext | None,
    ) -> Completion:
        target, names = await _target(server, ref)
        if argument.name not in names:
            raise MCPError(
                INVALID_PARAMS,
                f"{target} has no argument `{middle(argument.name, 80)}`.{did_you_mean(argument.name, names)} "
                f"It has: {', '.join(names) or 'none'}.",
            )
        known = await anyio.to_thread.run_sync(_known, startup, VALUES.get((target, argument.name)))
        # A list of ids is completed at its last entry; an id that it has already is not offered again.
        head, comma, last = argument.value.rpartition(",")
        if argument.name != "edit_ids":
            head, comma, last = "", "", argument.value
        taken = {each.strip() for each in head.split(",")}
        matching = [f"{head}{comma}{v}" for v in known if v.startswith(last.strip()) and v not in taken]
        return Completion(values=matching[:MOST], total=len(matching), has_more=len(matching) > MOST)


async def _target(
    server: MCPServer[Any], ref: PromptReference | ResourceTemplateReference
) -> tuple[str, Sequence[str]]:
    """What is referred to, and the names of its arguments. Raises MCPError when there is no such thing."""
    if isinstance(ref, PromptReference):
        kind, wanted = "prompt", ref.name
        known = {p.name: [a.name for a in p.arguments or []] for p in await server.list_prompts()}
    else:
        kind, wanted = "resource template", ref.uri
        templates = await server.list_resource_templates()
        known = {t.uri_template: [name for uri, name in VALUES if uri == t.uri_template] for t in templates}
    if wanted not in known:
        raise MCPError(
            INVALID_PARAMS,
            f"There is no {kind} {middle(wanted, 80)!r}.{did_you_mean(wanted, known)} "
            f"There are: {', '.join(known) or 'none'}.",
        )
    return wanted, known[wanted]


def _known(startup: Startup, values: _Values | None) -> list[str]:
    """What the argument can be; nothing while the model loads, since completion must be quick."""
    services = startup.ready()
    return [] if services is None or values is None else values(services)
