"""Measure edits on the live model: what it answers, how well the edits hold, and how far it has moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from editors import METHODS
from editors.edit import Edit
from editors.measure import DriftResult, Observation, observe, outcomes
from editors.patch import Patch, trained_prompts
from server.facts.reports import edit_outcome
from server.facts.results import EditOutcome
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace
from store import EditRecord


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
    trained: Sequence[Collection[str]] = (),
) -> Measured:
    """Compare the live model with what was observed before the edits.

    `trained` are, for each edit, the prompts its patch was trained on; they are left out of the rates.
    """
    after = ask_all(workspace, edits, ctx, 0.87, fluency)
    measured = outcomes(edits, before, after, trained=trained)
    ctx.report(0.95, 1.0, "measuring drift")
    results = [edit_outcome(edit, outcome) for edit, outcome in zip(edits, measured, strict=True)]
    return Measured(results, workspace.drift())


def trained_on(
    method: str, patch: Patch, edits: Sequence[Edit], params: Mapping[str, Any]
) -> list[frozenset[str]]:
    """For each edit of a patch, the prompts that the patch was trained on besides its edits' own."""
    prompts = trained_prompts(patch)
    if editor := METHODS.get(method):
        with suppress(ValidationError):  # parameters of another version: the patch's own record stands
            prompts = editor.trained_prompts(patch, edits, editor.params.model_validate(params))
    return [prompts] * len(edits)


def trained_on_by_record(
    workspace: Workspace, records: Sequence[EditRecord], stack: Sequence[ActivePatch]
) -> list[frozenset[str]]:
    """The same for edits of the ledger whose patches stand in `stack`."""
    patches = {active.patch_id: active for active in stack}
    trained: list[frozenset[str]] = []
    for record in records:
        edits = [edit_of(other) for other in records if other.patch_id == record.patch_id]
        params = workspace.ledger.get_patch(record.patch_id).params
        trained.append(trained_on(record.method, patches[record.patch_id].patch, edits, params)[0])
    return trained


def edit_of(record: EditRecord) -> Edit:
    """The request of a ledger row."""
    return Edit.model_validate({k: v for k, v in record.request.items() if k in Edit.model_fields})
