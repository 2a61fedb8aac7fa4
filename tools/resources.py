"""What an agent can read without calling a tool: status, edits, methods, the ledger's schema."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp_types import Resource
from pydantic import BaseModel

from server.request_context import RequestContext
from server.startup import Startup
from tools._errors import is_expected, is_unknown, middle
from tools.changes import EDIT, JOB, PROPOSAL, STATUS

JSON = "application/json"

_Value = TypeVar("_Value")


def add_resources(server: MCPServer[Any], startup: Startup) -> None:
    """Register the resources and templates on `server`."""

    @server.resource(STATUS, name="status", title="Model status", mime_type=JSON)
    async def status() -> str:
        """How the server stands, as model_status says it; readable while the model loads."""
        return _json(await anyio.to_thread.run_sync(startup.status))

    @server.resource(EDIT, name="edit", title="One edit", mime_type=JSON)
    async def edit(edit_id: str) -> str:
        """Everything the ledger knows about one edit, as show_edit says it."""
        return _json(await _ask(startup, lambda services: services.history.show_edit(edit_id)))

    @server.resource(JOB, name="job", title="One job", mime_type=JSON)
    async def job(job_id: str) -> str:
        """How a training or another long job stands, as get_job says it; subscribe to it to hear of its progress."""
        return _json(await _ask(startup, lambda services: services.jobs.get(job_id)))

    @server.resource(PROPOSAL, name="proposal", title="One proposal", mime_type=JSON)
    async def proposal(proposal_id: str) -> str:
        """How a proposal stands; subscribe to it to hear of the decision."""
        return _json(await _ask(startup, lambda services: services.proposals.get(proposal_id)))

    @server.resource("errata://methods/{name}", name="method", title="One editing method", mime_type=JSON)
    async def method(name: str) -> str:
        """What one editing method does, when to choose it, and its parameters."""
        known = [m.name for m in (await _ask(startup, lambda services: services.edits.methods())).methods]
        if name not in known:
            raise ResourceNotFoundError(f"No method {middle(name, 80)!r}; there are {', '.join(known)}.")
        return _json(await _ask(startup, lambda services: services.edits.method(name)))

    @server.resource(
        "errata://ledger/schema", name="ledger_schema", title="Schema of the ledger", mime_type="text/plain"
    )
    async def schema() -> str:
        """The tables, views and indexes of the ledger as SQL: what query_ledger can be asked."""
        return await _ask(startup, lambda services: services.history.schema())


LISTED = 50
"""Active edits in the list of resources, the newest first. Others are read by their id."""


async def active_edits(startup: Startup) -> list[Resource]:
    """The newest active edits as resources, for hosts in which a person chooses what the model gets to read."""
    services = startup.ready()
    if services is None:
        return []
    listed = functools.partial(services.history.list_edits, status="active", limit=LISTED)
    return [
        Resource(
            uri=EDIT.format(edit_id=edit.edit_id),
            name=edit.edit_id,
            title=middle(f"{edit.edit_id}: {edit.prompt.replace('{}', edit.subject)} {edit.target}", 120),
            description=f"A correction by {edit.method}, applied {edit.created}.",
            mime_type=JSON,
        )
        for edit in (await anyio.to_thread.run_sync(listed)).edits
    ]


async def _ask(startup: Startup, question: Callable[[Any], _Value]) -> _Value:
    try:
        services = await startup.services(RequestContext())
        return await anyio.to_thread.run_sync(functools.partial(question, services), abandon_on_cancel=True)
    except Exception as exc:
        if is_unknown(exc):
            raise ResourceNotFoundError(str(exc)) from exc
        if is_expected(exc):
            raise ResourceError(str(exc)) from exc
        raise


def _json(result: BaseModel) -> str:
    return result.model_dump_json(indent=2)
