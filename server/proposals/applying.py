"""What the ledger keeps of a proposal's preview, and how it becomes edits, also after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors.canaries import DriftResult
from editors.edit import Edit
from editors.patch_kinds import load
from server.facts.applying import Previewed, ledger_request
from server.facts.conflicts import active_conflicts
from server.facts.edit_request import EditRequest
from server.facts.guard import Guard
from server.facts.reports import measured_values
from server.methods import editor_named
from server.request_context import RequestContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, who
from store import Approval, ProposalRecord


class ModelChanged(Exception):
    """The model is not as it was when the proposal was measured."""


def computed(request: EditRequest, previewed: Previewed) -> dict[str, Any]:
    """The request, as JSON, and what applying it without the model needs."""
    trial = previewed.result.trial
    return {
        "edits": [ledger_request(edit) for edit in request.edits],
        "method": request.method,
        "params": request.params,
        "guard": None if request.guard is None else request.guard.model_dump(mode="json", exclude_unset=True),
        "replace": request.replace,
        "goal": request.goal,
        "computed": {
            "method": trial.editor.name,
            "params": trial.params.model_dump(mode="json"),
            "measurements": [measured_values(each) for each in trial.measured.results],
            "drift": vars(trial.measured.drift),
            "replaced": _ids(previewed.plan.replaced),
            "seconds": previewed.seconds,
        },
    }


def states(previewed: Previewed) -> dict[str, Any]:
    """The hashes of the model before the preview and with its patch."""
    staged = previewed.result.trial.staged
    return {
        "state_hash_before": previewed.state_hash,
        "weights_hash_before": staged.weights_hash_before,
        "weights_hash_after": staged.weights_hash_after,
        "state_hash_after": staged.state_hash,
    }


def request_of(proposal: ProposalRecord, approval: Approval) -> EditRequest:
    """The request, to be computed again and kept as the approval of the proposal."""
    asked = proposal.request
    return EditRequest(
        _edits(proposal),
        asked["method"],
        asked["params"],
        None if asked["guard"] is None else Guard.model_validate(asked["guard"]),
        asked["replace"],
        proposal.reason,
        proposal.source,
        goal=asked["goal"],
        approval=approval,
    )


def apply_as_proposed(
    workspace: Workspace, proposal: ProposalRecord, approval: Approval, ctx: RequestContext
) -> list[str]:
    """Put the patch of the preview on the model, and record it with what was measured then.

    Raises ModelChanged if the model differs from the preview's, before or with the patch.
    """
    made, hashes = proposal.request["computed"], proposal.states
    if proposal.blob is None or workspace.state_hash != hashes["state_hash_before"]:
        raise ModelChanged
    edits = _edits(proposal)
    replaced = active_conflicts(workspace, ((edit.subject, edit.text) for edit in edits))
    if _ids(replaced) != made["replaced"]:
        raise ModelChanged
    base = without(workspace, replaced)
    data = workspace.ledger.blobs.get(proposal.blob)
    with Transaction(workspace) as tx:
        tx.retry(base.stack)
        staged = tx.add(editor_named(made["method"]).name, load(data), len(edits), data)
        if staged.state_hash != hashes["state_hash_after"]:
            raise ModelChanged
        ctx.check()
        record = tx.describe(
            staged,
            [ledger_request(edit) for edit in edits],
            made["params"],
            measurements=made["measurements"],
            drift=DriftResult(**made["drift"]),
            seconds=made["seconds"],
            reason=proposal.reason,
            source=proposal.source,
        )
        return tx.commit_applied(
            [record], who(ctx), replaced=_ids(replaced), restack=base.restack, approval=approval
        )


def _edits(proposal: ProposalRecord) -> list[Edit]:
    return [Edit.model_validate(edit) for edit in proposal.request["edits"]]


def _ids(records: Sequence[Any]) -> list[str]:
    return [record.id for record in records]
