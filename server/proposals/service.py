"""The service of proposals: propose corrections, and decide on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from editors.edit import Edit
from server.errors import Conflict, ServiceError
from server.facts import applying
from server.facts.applying import Previewed
from server.facts.edit_request import EditRequest
from server.facts.guard import Goal, Guard
from server.facts.previews import Previews
from server.facts.results import EditReport
from server.proposals.applying import ModelChanged, apply_as_proposed, computed, request_of, states
from server.proposals.deciders import decided_by, refuse_own
from server.proposals.results import ProposalList, ProposalReport, ProposalRow, ProposalState
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, who
from store import Approval, ProposalRecord

DECISIONS = {"approve": "approved", "decline": "declined", "changes": "changes"}
MOST_LISTED = 200


class ProposalService:
    """Corrections that wait. Proposing and approving take their turn at the model; the rest reads the ledger."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def propose(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        replace: bool = False,
        reason: str | None = None,
        source: str | None = None,
        goal: Goal = "everywhere",
        ctx: RequestContext | None = None,
    ) -> ProposalReport:
        """Compute and measure edits as a preview, and let them wait; nothing is changed. Edits that break a bound
        are not proposed: the report names the bound.
        """
        ctx = ctx or RequestContext()
        request = EditRequest(list(edits), method, params, guard, replace, reason, source, goal=goal)
        workspace, kept = self._workspace, Previews[Previewed]()
        with workspace.turn(ctx):
            _ = workspace.writable_model_id
            report = applying.preview(workspace, request, ctx, kept)
            if report.failed_guard:
                return _not_proposed(report)
            previewed = kept.get(report.preview_id)
            made = workspace.ledger.record_proposal(
                workspace.writable_model_id,
                computed(request, previewed),
                _without_id(report).model_dump(mode="json"),
                previewed.result.trial.staged.data,
                states(previewed),
                who(ctx),
                reason=reason,
                source=source,
            )
        return ProposalReport(
            proposal_id=made.id,
            state="waiting",
            message=f"{made.id} waits for a decision. Nothing was changed.",
            report=_without_id(report),
            next=f"Somebody else decides: on the board, with decide_proposal({made.id!r}, ...), or at the command line "
            f"with errata-mcp decide {made.id}. errata://proposals/{made.id} shows its state.",
        )

    def decide(
        self, proposal_id: str, decision: str, note: str | None = None, ctx: RequestContext | None = None
    ) -> ProposalReport:
        """Approve a proposal (which applies it), decline it, or send it back for changes.

        Approved in the state in which it was measured, it is applied exactly as previewed. In another state it is
        computed and measured again first; if a bound fails then, it goes on waiting. Raises Conflict if the identity
        that proposed it approves it.
        """
        ctx = ctx or RequestContext()
        if decision not in DECISIONS:
            raise ServiceError(
                f"decision {decision[:40]!r} does not exist; use one of {', '.join(DECISIONS)}"
            )
        if decision == "changes" and not (note or "").strip():
            raise ServiceError(
                "note is empty; say which changes you want, so that the proposer can make them"
            )
        if decision == "approve":
            refuse_own(self._waiting(proposal_id), ctx, self._workspace.settings.approve_own)
            with self._workspace.turn(ctx):
                return self._approve(self._waiting(proposal_id), note, ctx)
        _ = self._workspace.writable_model_id
        self._waiting(proposal_id)
        named = cast(Literal["declined", "changes"], DECISIONS[decision])
        return _told(self._workspace.ledger.record_decision(proposal_id, named, who(ctx), note))

    def get(self, proposal_id: str) -> ProposalReport:
        """The state of a proposal. Raises NoSuchProposal."""
        found = self._workspace.ledger.get_proposal(proposal_id)
        return _told(found).model_copy(update={"report": EditReport.model_validate(found.report)})

    def record(self, proposal_id: str) -> ProposalRecord:
        """A proposal as the ledger has it. Raises NoSuchProposal."""
        return self._workspace.ledger.get_proposal(proposal_id)

    def list(self, state: str | None = None, limit: int = 20) -> ProposalList:
        """Proposals, newest first. Raises BadFilter."""
        ledger = self._workspace.ledger
        rows = [_row(each) for each in ledger.proposals(state, limit)]
        return ProposalList(proposals=rows, waiting=ledger.count_proposals("waiting"))

    def _waiting(self, proposal_id: str) -> ProposalRecord:
        found = self._workspace.ledger.get_proposal(proposal_id)
        if found.state != "waiting":
            raise Conflict(f"{proposal_id} is {_STATES[found.state]} already; nothing was changed")
        return found

    def _approve(self, waiting: ProposalRecord, note: str | None, ctx: RequestContext) -> ProposalReport:
        workspace = self._workspace
        if waiting.model_id != workspace.writable_model_id:
            raise Conflict(
                f"{waiting.id} was computed for another model than the loaded one; propose it again for this one"
            )
        approval = Approval(waiting.id, note)
        try:
            ids = apply_as_proposed(workspace, waiting, approval, ctx)
            report, how = EditReport.model_validate(waiting.report), "exactly as it was measured"
        except ModelChanged:
            report = applying.apply(workspace, request_of(waiting, approval), ctx)
            ids, how = report.edit_ids, "measured again first, as the model had changed since"
        if not ids:
            return ProposalReport(
                proposal_id=waiting.id,
                state="waiting",
                message=f"{waiting.id} still waits: the model has changed since, and measured again it breaks a bound: "
                f"{'; '.join(report.failed_guard)}. Nothing was changed.",
                report=report,
                next="Decline it, or ask for changes.",
            )
        told = _told(workspace.ledger.get_proposal(waiting.id))
        return told.model_copy(update={"report": report, "message": f"{told.message} It was applied {how}."})


_STATES = {
    "waiting": "waiting",
    "approved": "approved",
    "declined": "declined",
    "changes": "sent back for changes",
}


def _not_proposed(report: EditReport) -> ProposalReport:
    return ProposalReport(
        proposal_id="",
        state="rejected",
        message=f"Nothing was proposed: {'; '.join(report.failed_guard)}.",
        report=report,
        next="Propose again with other wordings, another method or params, or a wider guard.",
    )


def _without_id(report: EditReport) -> EditReport:
    """The id of a preview ends with the server; a proposal has its own."""
    return report.model_copy(update={"preview_id": "", "next": ""})


def _told(found: ProposalRecord) -> ProposalReport:
    next_step = {
        "waiting": "It waits for a decision.",
        "approved": f"revert_edits({list(found.edit_ids)!r}) takes it back.",
        "declined": "Nothing to do.",
        "changes": "Propose it again with the changes that `note` asks for.",
    }[found.state]
    by = f", by {decided_by(found)}" if found.decided else ""
    became = f" as {', '.join(found.edit_ids[:10])}" if found.edit_ids else ""
    return ProposalReport(
        proposal_id=found.id,
        state=cast(ProposalState, found.state),
        message=f"{found.id} is {_STATES[found.state]}{became}{by}.",
        note=found.note,
        edit_ids=list(found.edit_ids),
        next=next_step,
    )


def _row(found: ProposalRecord) -> ProposalRow:
    edits = found.request["edits"]
    return ProposalRow(
        proposal_id=found.id,
        state=cast(ProposalState, found.state),
        facts=[f"{each['prompt']} -> {each['target']}" for each in edits[:3]],
        edits=len(edits),
        reason=found.reason,
        client=found.client,
        identity=found.identity,
        created=found.created,
        decided=found.decided,
        decided_by=decided_by(found) or None,
        note=found.note,
        edit_ids=list(found.edit_ids),
    )
