"""Toolset `edit`: preview, apply, revert and reapply corrections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from editors.edit import Edit, Text
from server.facts.condensed import Detail, condensed, condensed_revert
from server.facts.forgetting_results import ForgetReport
from server.facts.guard import Goal, Guard
from server.facts.queries import INSTEAD, Forget
from server.facts.results import EditReport, MethodList, RevertReport
from tools._toolset import ToolRequest, Toolset

toolset = Toolset("edit")

EditId = Annotated[str, Field(min_length=1, max_length=64)]
Edits = Annotated[
    list[Edit],
    Field(min_length=1, max_length=1000, description="The facts to correct."),
]
NewEdits = Annotated[
    list[Edit] | None,
    Field(min_length=1, max_length=1000, description="The facts to correct; leave out with preview_id."),
]
EditIds = Annotated[
    list[EditId],
    Field(min_length=1, max_length=1000, description='Ids of edits or ranges: ["e1", "e4-e46"].'),
]
Method = Annotated[
    str,
    Field(max_length=64, description='"auto" chooses; see list_methods.'),
]
Params = Annotated[
    dict[str, Any] | None,
    Field(
        description='Parameters of the method, as list_methods(name) has them; {"preset": "published"}: the paper\'s.'
    ),
]
Bounds = Annotated[
    Guard | None,
    Field(description="Bounds on the measured result; if one fails, nothing is kept."),
]
GoalOf = Annotated[
    Goal,
    Field(
        description='"everywhere": it must hold wherever people ask. "export": by plain weights, for export_edits.'
    ),
]
Partial = Annotated[
    bool,
    Field(description="Keep the edits that hold; name the others in `left_out`."),
]
Reason = Annotated[Text | None, Field(description="Why; kept on the ledger.")]
HowMuch = Annotated[
    Detail,
    Field(description="brief: of many edits counts, failures, damage; full: all."),
]


@toolset.tool("Preview edits")
def preview_edits(
    request: ToolRequest,
    edits: Edits,
    method: Method = "auto",
    params: Params = None,
    guard: Bounds = None,
    explain: Annotated[
        bool,
        Field(description="Also list the known facts nearest to the edits."),
    ] = False,
    goal: GoalOf = "everywhere",
    partial: Partial = False,
    detail: HowMuch = "brief",
) -> EditReport:
    """A dry run of apply_edits: compute and measure corrections, keep nothing. The report counts what holds, in which
    wordings, and what else would change. Next: apply_edits(preview_id), or another method
    (list_methods).

    Details:
    Use it to see whether a correction will hold, and what else it would change, before the model is changed.
    A read-only server allows it too. The report has, for each edit, the answer before and after,
    reliability (does the model now say the target), generality over your `paraphrases`, locality over your
    `neighbours`, and the drift of the whole model; `edit_ids` is empty. Give paraphrases and neighbours:
    without them only reliability can be measured. `explain` adds `nearby`: the ledger's edits and canary texts that
    the edit affects most. Next: apply_edits with the same arguments, or try another `method` or `params`
    (list_methods) when the report is not good enough.
    """
    report = request.services.edits.preview(
        edits,
        method=method,
        params=params,
        guard=guard,
        explain=explain,
        goal=goal,
        partial=partial,
        ctx=request.ctx,
    )
    return condensed(report, detail)


@toolset.tool("Apply edits", changes=True, destructive=True)
def apply_edits(
    request: ToolRequest,
    edits: NewEdits = None,
    method: Method = "auto",
    params: Params = None,
    guard: Bounds = None,
    replace: Annotated[
        bool,
        Field(description="Retire an active edit of the same subject and prompt."),
    ] = False,
    reason: Reason = None,
    source: Annotated[Text | None, Field(description="Where the right answers come from.")] = None,
    goal: GoalOf = "everywhere",
    partial: Partial = False,
    preview_id: Annotated[
        str | None,
        Field(max_length=64, description="Instead of `edits`: keep what this preview computed, as it is."),
    ] = None,
    recompute: Annotated[
        bool, Field(description="With preview_id: compute again if the model has changed since.")
    ] = False,
    detail: HowMuch = "brief",
) -> EditReport:
    """Correct facts in the model and record them, as one transaction: all is kept or nothing. If a bound of `guard`
    fails, `status` is "rejected" and the model is as before. The report counts what holds and names every
    damage; revert_edits with `edit_ids` undoes it.

    Details:
    The edits are computed, applied, measured and kept only if every bound in `guard` holds; otherwise the
    weights are as they were, `status` is "rejected" and `failed_guard` names the bound. On success
    `edit_ids` are the ids to undo them by with revert_edits, and the report says how well each one holds.
    An edit that contradicts an active one is refused unless `replace` is true. Use check_facts first to see
    what the model believes, and preview_edits when unsure. Next: read `warnings` and `next`; ask_model with
    compare_to_base shows the effect in running text.
    """
    report = request.services.edits.apply(
        edits or (),
        method=method,
        params=params,
        guard=guard,
        replace=replace,
        reason=reason,
        source=source,
        goal=goal,
        partial=partial,
        preview_id=preview_id,
        recompute=recompute,
        ctx=request.ctx,
    )
    return condensed(report, detail)


@toolset.tool("Revert edits", changes=True, destructive=True, idempotent=True)
def revert_edits(
    request: ToolRequest, edit_ids: EditIds, reason: Reason = None, detail: HowMuch = "brief"
) -> RevertReport:
    """Take corrections back, any of them, in any order: the weights become bit for bit those without them.
    `computed_on_top` names edits to check with audit_edits. reapply_edits brings an edit back.

    Details:
    The weights become bit for bit those of the pristine model with the other active edits; `weights_hash` shows
    it, and `restored` has the model's answers now. Edits under `computed_on_top` were computed while a reverted
    one was in the weights: they stay as they are, so check them with audit_edits. An edit that is not active is
    listed under `unchanged`; that is no error. Nothing is lost: reapply_edits brings an edit back. Use list_edits
    to find ids.
    """
    return condensed_revert(request.services.edits.revert(edit_ids, reason=reason, ctx=request.ctx), detail)


@toolset.tool("Reapply edits", changes=True, idempotent=True)
def reapply_edits(
    request: ToolRequest, edit_ids: EditIds, reason: Reason = None, detail: HowMuch = "brief"
) -> EditReport:
    """Bring reverted corrections back from their stored patches, bit for bit, each in its old place. The report is
    that of apply_edits. Find ids with list_edits.

    Details:
    Each edit takes its old place in the order of the ledger, so the weights are bit for bit those before the
    revert, if nothing else has changed. The report is that of apply_edits, with new measurements. Reapplying an
    active edit changes nothing. Next: read the results; if an edit no longer holds, revert it and apply it again
    with apply_edits.
    """
    return condensed(request.services.edits.reapply(edit_ids, reason=reason, ctx=request.ctx), detail)


class FactToForget(BaseModel):
    """A fact to forget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: Text = Field(description="What it is about.")
    prompt: Text = Field(description="The sentence up to the answer, or a question.")
    answer: Text | None = Field(None, description="What must not be said; left out: what the model says.")
    instead: Text = Field(INSTEAD, description="A neutral continuation.")


@toolset.tool("Forget facts", changes=True, destructive=True)
def forget_facts(
    request: ToolRequest,
    facts: Annotated[list[FactToForget], Field(min_length=1, max_length=100, description="What to forget.")],
    goal: GoalOf = "everywhere",
    max_said: Annotated[
        float, Field(ge=0, le=1, description="Most of the other wordings in which it may still be said.")
    ] = 0.0,
    reason: Reason = None,
    source: Annotated[Text | None, Field(description="Who asks for it.")] = None,
) -> ForgetReport:
    """Make the model stop giving an answer, with no other answer in its place. Kept only if the old answer is gone
    from wordings that were not learned. revert_edits undoes it.

    Details:
    One transaction: all facts are suppressed or nothing changes. The shares count answers with the old one anywhere in
    them. `hidden` is true if a memory beside the weights suppresses the fact: the weights still contain it, and so
    would an export of them. goal="export" changes the weights instead. The standing bounds of apply_edits hold here
    as well.
    """
    wanted = [Forget(fact.subject, fact.prompt, fact.answer, fact.instead) for fact in facts]
    return request.services.edits.forget(wanted, goal, max_said, reason, source, ctx=request.ctx)


@toolset.tool("List methods", takes_turn=False)
def list_methods(
    request: ToolRequest,
    name: Annotated[str | None, Field(max_length=64, description="One method, in full.")] = None,
) -> MethodList:
    """The editing methods in one line each: when to choose it, and whether it is ready. With `name`: all about one,
    with the schema of its `params`. method="auto" is right for most corrections.

    Details:
    Use it before setting `method` or `params` in preview_edits and apply_edits. With `name` the entry has the JSON
    schema of its parameters with the defaults for this model, what it needs first (statistics, training), its cost
    and its source. `auto` says how method="auto" chooses, which is right for most
    corrections. Nothing is changed.
    """
    return request.services.edits.methods(name)
