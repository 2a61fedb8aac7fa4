"""How a call of preview or apply is carried out, the results of its trials, and its report."""

from __future__ import annotations

import time
from dataclasses import dataclass

from editors.method import Params
from server.facts.advice import after_edit
from server.facts.auto_method import Way
from server.facts.conflicts import (
    Contradiction,
)
from server.facts.edit_request import AUTO, EditRequest
from server.facts.ids import ranges
from server.facts.layer_trials import LayerChoice
from server.facts.profile import profile_note
from server.facts.reports import edit_report, unheld
from server.facts.results import Attempt, EditReport, Nearby
from server.facts.trials import Trial
from server.transaction.stack import Restacked
from server.transaction.workspace import Workspace
from store import EditRecord


@dataclass(frozen=True)
class ApplyPlan:
    """How a request will be carried out. Everything that can be refused is refused before the long work."""

    ways: list[Way]  # the first is computed first; others only with method="auto"
    params: Params  # of the first way
    replaced: list[EditRecord]
    base: Restacked  # the live stack without what is replaced
    layer: LayerChoice
    contradictions: list[Contradiction]


@dataclass(frozen=True)
class Tried:
    """The results of all trials of a call."""

    trial: Trial
    tried: list[Attempt]
    rows: list[int]  # the edits that the trial has
    left_out: list[str]
    untaught: list[str]  # a note for each edit whose relation is not known


def apply_report(
    workspace: Workspace,
    request: EditRequest,
    plan: ApplyPlan,
    result: Tried,
    nearby: list[Nearby],
    status: str,
    ids: list[str],
    started: float,
) -> EditReport:
    trial, measured = result.trial, result.trial.measured
    params = trial.params.model_dump(mode="json")
    reasons = [trial.way.reason, profile_note(workspace, trial.editor.name, params)]
    return edit_report(
        status=status,
        edit_ids=ids,
        method=trial.editor.name,
        method_reason="; ".join(filter(None, reasons)),
        params=params,
        measured_results=measured.results,
        drift=measured.drift,
        changed=measured.changed,
        perplexity_ratio=measured.perplexity_ratio,
        tried=[each.model_copy(update={"kept": each.kept and status != "rejected"}) for each in result.tried],
        left_out=result.left_out,
        failed_guard=trial.failed,
        nearby=nearby,
        notes=_notes(request, plan, result, ids),
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.short_state_hash,
        seconds=time.monotonic() - started,
        next_step=after_edit(
            workspace.lm,
            status,
            trial.editor.name,
            params,
            measured.results,
            ids,
            trial.failed,
            changed=measured.changed,
            weak=trial.is_weak,
            auto=request.method == AUTO,
        ),
    )


def _replacing(request: EditRequest, plan: ApplyPlan, result: Tried, kept: bool) -> list[str]:
    """A note that names the replaced edits and says that `before` is not their answer."""
    texts = {request.edits[i].text for i in result.rows}
    old = [record.id for record in plan.replaced if record.prompt in texts or not result.left_out]
    if not old:
        return []
    named = ", ".join(ranges(old))
    return [
        f"{named} {'was' if len(old) == 1 else 'were'} replaced; `before` is what the original model said"
        if kept
        else f"would replace {named}; `before` is what the original model said"
    ]


def _notes(request: EditRequest, plan: ApplyPlan, result: Tried, ids: list[str]) -> list[str]:
    """Notes on what was replaced, what contradicts, what does not hold, and the choice of the layer."""
    notes = _replacing(request, plan, result, bool(ids))
    named = ids if len(ids) == len(request.edits) else []
    notes += [each.described(request.edits, named) for each in plan.contradictions]
    notes += unheld([request.edits[i] for i in result.rows], result.trial.measured.results)
    notes += result.untaught
    return [*notes, *filter(None, [plan.layer.note])]
