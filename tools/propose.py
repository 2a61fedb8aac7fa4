"""Toolset `people`: corrections that wait for a person to decide, and reports to hand over."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from editors.edit import Text
from server.facts.condensed import condensed
from server.proposals.results import ProposalList, ProposalReport
from server.reporting.results import ReportFile
from tools._toolset import ToolRequest, Toolset
from tools.edit import Bounds, Edits, GoalOf, Method, Params, Reason

toolset = Toolset("people")

ProposalId = Annotated[str, Field(min_length=1, max_length=64, description='Such as "p1".')]


@toolset.tool("Propose edits", changes=True, scope="propose")
def propose_edits(
    request: ToolRequest,
    edits: Edits,
    method: Method = "auto",
    params: Params = None,
    guard: Bounds = None,
    replace: Annotated[bool, Field(description="Retire an active edit of the same fact.")] = False,
    reason: Reason = None,
    source: Annotated[Text | None, Field(description="Where the right answers come from.")] = None,
    goal: GoalOf = "everywhere",
) -> ProposalReport:
    """Let corrections wait for approval, computed and measured like a preview.

    Nothing changes until a person on the board, or decide_proposal, decides.
    """
    return _short(
        request.services.proposals.propose(
            edits, method, params, guard, replace, reason, source, goal, ctx=request.ctx
        )
    )


@toolset.tool("Decide on a proposal", changes=True, destructive=True)
def decide_proposal(
    request: ToolRequest,
    proposal_id: ProposalId,
    decision: Annotated[
        Literal["approve", "decline", "changes"],
        Field(description="changes: send it back; `note` says what is wanted."),
    ],
    note: Annotated[
        str | None, Field(max_length=2000, description="A word with it; needed for changes.")
    ] = None,
) -> ProposalReport:
    """Approve a proposal, decline it, or ask for changes.

    Approved, it is applied as previewed; if the model has changed since, it is measured again first.
    """
    return _short(request.services.proposals.decide(proposal_id, decision, note, ctx=request.ctx))


@toolset.tool("List proposals", takes_turn=False)
def list_proposals(
    request: ToolRequest,
    state: Annotated[
        Literal["waiting", "approved", "declined", "changes"] | None, Field(description="Only these.")
    ] = None,
    limit: Annotated[int, Field(ge=1, le=200, description="Most of them.")] = 20,
) -> ProposalList:
    """Corrections that wait for a decision or had one. Each says who proposed it and what it became."""
    return request.services.proposals.list(state, limit)


@toolset.tool("Report", takes_turn=False)
def report(
    request: ToolRequest,
    format: Annotated[
        Literal["html", "md"], Field(description="One self-contained page, or Markdown.")
    ] = "html",
    since: Annotated[str | None, Field(max_length=64, description="ISO 8601 date or time.")] = None,
    until: Annotated[str | None, Field(max_length=64, description="The last day, or a time.")] = None,
    batch: Annotated[int | None, Field(ge=1, description="Only the edits of one call.")] = None,
) -> ReportFile:
    """Write a report for an auditor to HOME/exports: corrections, evidence, cost, reverts, hashes.

    The ledger is verified for it.
    """
    return request.services.reports.write(format, since, until, batch)


def _short(told: ProposalReport) -> ProposalReport:
    return told if told.report is None else told.model_copy(update={"report": condensed(told.report)})
