"""Toolset `edit`, its third part: carry the edits of another base over to the model that is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.rebase.requests import SAME, Approve, RebaseWishes
from server.rebase.results import Rebase
from tools._toolset import ToolRequest, Toolset, WaitSeconds
from tools.edit import Bounds

toolset = Toolset("edit")


@toolset.tool("Rebase edits", takes_turn=False, changes=True, destructive=True)
async def rebase_edits(
    request: ToolRequest,
    to: Annotated[
        str | None,
        Field(max_length=4096, description="The loaded model; may be left out."),
    ] = None,
    from_model: Annotated[
        str | None,
        Field(max_length=4096, description="Whose edits; needed if several have some."),
    ] = None,
    method: Annotated[
        str, Field(max_length=64, description='Of edits computed anew; "same": as before.')
    ] = SAME,
    guard: Bounds = None,
    approve: Annotated[Approve, Field(description='"ask" stops at the plan, with nothing changed.')] = "auto",
    plan: Annotated[
        str | None, Field(max_length=64, description="Job id of a plan to carry out as it is.")
    ] = None,
    wait_seconds: WaitSeconds = 45,
) -> Rebase:
    """Carry the active edits of another base (checkpoint, size, quantisation) over to the loaded model, as a job. Facts
    it has right need no edit, patches that still hold are kept, the rest is computed anew. The old base keeps its own.

    Details:
    Start the server with the new model and the same home; model_status then names the edits that are of another base.
    `to` can only be that model: one model is loaded at a time. A fact is right where check_facts agrees and it holds in
    other wordings as a good edit does. An old patch is kept where it fits the new weights, its edits hold and no bound
    of a new edit is broken. Otherwise each call is one call again, by its old method with this model's own parameters;
    what fails is tried alone by method="auto", with weights where weights were edited; what cannot be made to hold is
    left out and named. Prompt, target, probes, holds, reason and source are kept, and the new request's `rebased.from`
    is the old id. Memories of facts are carried like other edits. Steering vectors, and adapters that name no fact, are
    not carried, and are named. The same weights in another precision have their edits without this call. Every batch
    is one transaction; revert_edits takes any of it back.
    """
    return await request.services.rebasing.rebase(
        to, from_model, RebaseWishes(method=method, guard=guard), approve, plan, wait_seconds, request.ctx
    )
