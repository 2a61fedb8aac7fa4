"""The registry of tools and the one way each of them is run.

A tool is a plain function with a `ToolRequest` as its first parameter, typed arguments, and a pydantic result. Its
docstring up to a line "Details:" is its description, of two to four short sentences: every agent pays for it. It runs
in a worker thread when its turn at the model has come (with `takes_turn=False` at once); an async function runs in the
event loop:

    toolset = Toolset("ledger")

    @toolset.tool("Show edit")
    def show_edit(request: ToolRequest, edit_id: Annotated[str, Field(description="...")]) -> EditDetail:
        \"\"\"When to use it, what comes back, what to do next.\"\"\"
        return request.services.history.show_edit(edit_id)

`request.show(png)` puts a picture beside the result, for hosts that show images.

A new toolset is one module like this and its line in `tools/__init__.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from server.http.identity import Identity, Scope
from server.request_context import RequestContext
from server.startup import Startup

if TYPE_CHECKING:
    from server.services import Services

log = logging.getLogger("errata.tools")

REQUEST = "request"

WaitSeconds = Annotated[int, Field(ge=0, le=600, description="Seconds to wait for the job.")]
"""How long a tool that starts or looks at a job waits for its end."""

DETAILS = "Details:\n"
"""What follows this line of a docstring stands in the reference only; agents do not get it."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class ToolRequest:
    """What a tool works with during one call."""

    startup: Startup
    ctx: RequestContext
    opened: Services | None = None
    pictures: list[bytes] = field(default_factory=list)
    identity: Identity | None = None  # None where no token is asked for

    def require(self, scope: Scope, what: str) -> None:
        """Raise ToolError when the caller's token does not allow `what`, for example what one argument asks for."""
        if self.identity is not None and not self.identity.may(scope):
            raise ToolError(f"{what} needs a token with the scope {scope!r}. Nothing was changed.")

    def show(self, png: bytes) -> None:
        """Put a PNG beside the tool's result."""
        self.pictures.append(png)

    @property
    def services(self) -> Services:
        """The services. Tools that were registered with `waits=False` have none."""
        if self.opened is None:
            raise RuntimeError("a tool registered with waits=False has no services")
        return self.opened


@dataclass(frozen=True)
class Spec:
    """One tool of the registry: its function and what a host should know before calling it."""

    function: Callable[..., Any]
    title: str
    changes: bool
    destructive: bool
    idempotent: bool
    waits: bool
    takes_turn: bool
    scope: Scope

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def annotations(self) -> ToolAnnotations:
        return ToolAnnotations(
            title=self.title,
            read_only_hint=not self.changes,
            destructive_hint=self.destructive,
            idempotent_hint=self.idempotent,
            open_world_hint=False,
        )


@dataclass(frozen=True)
class Toolset:
    """A named group of tools that `--toolsets` switches on or off together."""

    name: str
    specs: list[Spec] = field(default_factory=list)

    def joined(self, other: Toolset) -> Toolset:
        """One toolset of the tools of both, for a toolset that is written in two modules."""
        return Toolset(self.name, [*self.specs, *other.specs])

    def tool(
        self,
        title: str,
        *,
        changes: bool = False,
        destructive: bool = False,
        idempotent: bool | None = None,
        waits: bool = True,
        takes_turn: bool = True,
        scope: Scope | None = None,
    ) -> Callable[[_Function], _Function]:
        """Register the decorated function.

        `changes`: alters the model or its history beyond measurements, so `--read-only` removes
        it. `destructive`: may undo or replace earlier work. `idempotent`: repeating the call has
        no further effect (the default for tools that change nothing). `waits`: needs the loaded
        model; False for what must answer while it loads. `takes_turn`: waits in line for the model;
        False for what reads the ledger alone, and for async functions that wait in their own way. `scope`: what a
        token needs to call it; left out, "edit" for what changes something and "read" for what does not.
        """

        def register(function: _Function) -> _Function:
            again = not changes if idempotent is None else idempotent
            needed: Scope = scope or ("edit" if changes else "read")
            self.specs.append(
                Spec(function, title, changes, destructive, again, waits, waits and takes_turn, needed)
            )
            return function

        return register
