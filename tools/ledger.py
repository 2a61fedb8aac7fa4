"""Toolset `ledger`: the history of corrections, and whether they still hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from editors.edit import Text
from server.errors import ServiceError
from server.facts.asking_results import Explanation
from server.facts.condensed import Detail, condensed, condensed_edit
from server.facts.history_results import Audit, EditDetail, EditList, Rows
from tools._toolset import ToolRequest, Toolset
from tools.edit import EditId, HowMuch

toolset = Toolset("ledger")

Scalar = str | int | float | bool | None


@toolset.tool("List edits", takes_turn=False)
def list_edits(
    request: ToolRequest,
    status: Annotated[
        Literal["active", "reverted", "replaced", "rejected"] | None,
        Field(description="Only edits in this state."),
    ] = None,
    subject: Annotated[str | None, Field(max_length=4000, description="Only edits of this subject.")] = None,
    text: Annotated[
        str | None,
        Field(max_length=4000, description="Full-text search."),
    ] = None,
    method: Annotated[
        str | None, Field(max_length=64, description="Only edits made with this method.")
    ] = None,
    since: Annotated[
        str | None,
        Field(max_length=64, description="Only edits since this ISO 8601 time."),
    ] = None,
    limit: Annotated[int, Field(ge=1, le=200, description="Most edits to return.")] = 20,
    cursor: Annotated[
        str | None, Field(max_length=1000, description="`next_cursor` of the page before.")
    ] = None,
) -> EditList:
    """The corrections on the ledger, newest first, with their state and how well they held. Filters combine.
    Next: show_edit, audit_edits, revert_edits.

    Details:
    Use it to find the id of an edit, to see what was corrected before and why, or to look for earlier
    work on a subject before editing it again. All filters combine. `total` counts every match; when
    `next_cursor` is not null, pass it as `cursor` for the next page. Next: show_edit for everything about
    one edit, revert_edits or reapply_edits to change its state, audit_edits to see whether it still holds.
    """
    return request.services.history.list_edits(
        status=status, subject=subject, text=text, method=method, since=since, limit=limit, cursor=cursor
    )


@toolset.tool("Show edit", takes_turn=False)
def show_edit(
    request: ToolRequest,
    edit_id: Annotated[EditId, Field(description='Id of the edit, such as "e1".')],
    detail: Detail = "brief",
) -> EditDetail:
    """What the ledger knows about one edit: request, method, measurements with what did not hold, events; "full": all.
    Next: audit_edits measures it afresh.

    Details:
    With detail="full" it returns the request as it was made, the method and its parameters, the patch and its file,
    the hashes of the weights before and after, all measurements over time, and every event with who asked, when and
    why. Use it to explain a correction or to judge whether to keep it. Nothing is changed. Next: audit_edits
    measures it afresh, revert_edits takes it back.
    """
    return condensed_edit(request.services.history.show_edit(edit_id), detail)


@toolset.tool("Audit edits")
def audit_edits(
    request: ToolRequest,
    edit_ids: Annotated[
        list[EditId] | None,
        Field(min_length=1, max_length=1000, description="Left out: every active edit."),
    ] = None,
    repair: Annotated[
        bool,
        Field(description="Rebuild the live weights if they differ from the ledger."),
    ] = False,
    fluency: Annotated[
        bool, Field(description="Also the entropy of generated text, which takes longest.")
    ] = False,
    detail: HowMuch = "brief",
    engine: Annotated[
        str | None,
        Field(
            min_length=1, max_length=64, description="Ask this engine instead, for what it was given last."
        ),
    ] = None,
) -> Audit:
    """Measure whether corrections still hold, and verify that ledger, patch files and weights agree. Use it after
    several edits or when an answer looks wrong. `failing` names those to apply again or revert; many are asked by a
    job. With `engine`: whether that engine still holds what it was given.

    Details:
    Use it after several edits, after a revert, or when an answer looks wrong: later edits can weaken earlier
    ones. `failing` names the edits whose target is no longer what the model says; `integrity` says whether
    the event chain is unbroken, every patch file is whole and the live weights are exactly what the ledger
    describes; `drift` is the distance from the pristine model. Without `repair` no weight is changed; the
    measurements are added to the history. Next: apply_edits with replace=true for edits that fail.
    """
    if repair:
        request.require("edit", "repair=true")
    if engine is not None:
        if edit_ids is not None:
            raise ServiceError(
                "edit_ids and engine: an engine is asked for all that it was given last; leave edit_ids out"
            )
        return request.services.engines.audit(engine, ctx=request.ctx)
    full = detail == "full"
    if not repair and (started := request.services.jobs.audit(edit_ids, fluency, full, ctx=request.ctx)):
        return started
    audit = request.services.edits.audit(edit_ids, repair=repair, fluency=fluency, full=full, ctx=request.ctx)
    return condensed(audit, detail)


@toolset.tool("Explain an answer")
def explain_answer(
    request: ToolRequest,
    prompt: Annotated[Text, Field(description="What the model is asked.")],
    chat: Annotated[
        bool | None, Field(description="Put it as a message; left out: when it is a question.")
    ] = None,
    max_new_tokens: Annotated[int, Field(ge=1, le=64, description="Length of the answers.")] = 12,
    limit: Annotated[int, Field(ge=1, le=100, description="Most edits in the answer.")] = 5,
) -> Explanation:
    """Which active edits make the model say this: ranked by how much each moves the answer, with the answer without
    it. Next: revert_edits, or apply_edits to correct it.

    Details:
    Each edit is left out and the prompt asked again; of more than 16, halves of them, and halves of those that matter.
    Steering doses count as edits. Edits that act only together come as one group. The model is as before afterwards,
    to the bit, and nothing is recorded.
    """
    return request.services.edits.explain(prompt, chat, max_new_tokens, limit, ctx=request.ctx)


@toolset.tool("Query the ledger", takes_turn=False)
def query_ledger(
    request: ToolRequest,
    sql: Annotated[
        str, Field(min_length=1, max_length=20_000, description="One SELECT statement, in SQLite's dialect.")
    ],
    params: Annotated[
        list[Scalar] | dict[str, Scalar] | None,
        Field(description="Values for ? or :name placeholders in the statement."),
    ] = None,
    limit: Annotated[int, Field(ge=1, le=1000, description="Most rows to return.")] = 100,
) -> Rows:
    """Run one read-only SQL query over the ledger. The resource errata://ledger/schema has the tables. Pass
    values through `params`.

    Details:
    The resource errata://ledger/schema has the tables and columns. Statements that write, or take too long,
    are refused; pass values through `params` rather than into the text. `truncated` is true when there were
    more rows than `limit`. For the common questions list_edits and show_edit are simpler.
    """
    return request.services.history.query(sql, params=params, limit=limit)
