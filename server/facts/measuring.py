"""Measure edits on the live model: what it answers, how well the edits hold, and how far it has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editors.edit import Edit
from editors.measure import DriftResult, Observation, observe, outcomes
from server.facts.reports import edit_outcome
from server.facts.results import EditOutcome
from server.request_context import RequestContext
from server.transaction.workspace import Workspace


@dataclass(frozen=True)
class Measured:
    """The outcome of every edit, and the drift of the whole model."""

    results: list[EditOutcome]
    drift: DriftResult


def ask_all(
    workspace: Workspace, edits: Sequence[Edit], ctx: RequestContext, at: float, fluency: bool = False
) -> Observation:
    """What the live model answers to every prompt of the edits. `at`: the call's progress, 0..1."""
    ctx.report(at, 1.0, "asking the model")
    return observe(workspace.lm, edits, fluency=fluency)


def measure(
    workspace: Workspace,
    edits: Sequence[Edit],
    before: Observation,
    ctx: RequestContext,
    fluency: bool = False,
) -> Measured:
    """Compare the live model with what was observed before the edits."""
    after = ask_all(workspace, edits, ctx, 0.87, fluency)
    found = outcomes(edits, before, after)
    ctx.report(0.95, 1.0, "measuring drift")
    results = [edit_outcome(edit, outcome) for edit, outcome in zip(edits, found, strict=True)]
    return Measured(results, workspace.drift())
