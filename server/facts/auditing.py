"""Whether active edits still hold, and whether the ledger, the patch files and the live weights agree."""

from __future__ import annotations

import time
from collections.abc import Sequence

from editors.constants import assumed
from editors.measure import observe, outcomes
from server.errors import ServiceError
from server.facts.ids import ranges
from server.facts.material import collect
from server.facts.measuring import changed_in, edit_of, trained_on_by_record
from server.facts.neighbours import with_neighbours
from server.facts.reports import (
    MOST_CHANGED,
    brief,
    drift_result,
    edit_outcome,
    mean_forms,
    mean_rate,
    measured_values,
    summary,
)
from server.facts.results import Audit, EditOutcome, Integrity
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, fact_edits, who
from store import EditRecord

MOST_WITH_FORMS = assumed(
    40,
    "Active edits up to which an audit asks every form and the subjects' other facts; of more, the prompts they name.",
    "about a minute on the default model",
)
REBUILT = "the live weights were rebuilt from the pristine ones and the ledger"


def audit(workspace: Workspace, edit_ids: Sequence[str] | None, repair: bool, ctx: RequestContext) -> Audit:
    """Measure active edits against the pristine model, and check ledger, files and weights.

    With `repair`, live weights that differ from the ledger are rebuilt first. Raises ServiceError for an edit
    that is not active.
    """
    started = time.monotonic()
    integrity = check_integrity(workspace)
    repaired: list[str] = []
    if repair and not integrity.weights:
        workspace.host.rebuild()
        integrity = check_integrity(workspace)
        if integrity.weights:
            repaired.append(REBUILT)
    records = fact_edits(_records(workspace, edit_ids))
    results = _measure(workspace, records, ctx) if records else []
    drift = workspace.drift()
    if records and not workspace.read_only:
        values = {r.edit_id: measured_values(r) for r in results if r.edit_id}
        workspace.ledger.record_measurements(values, "audit", vars(drift), who(ctx))
    failing = [r.edit_id for r in results if r.reliability < 1 and r.edit_id]
    changed = changed_in(results)
    return Audit(
        summary=summary(results, changed, None) if results else "No edit is active.",
        edits=brief(results),
        forms=mean_forms(results),
        subject_locality=mean_rate(results, "subject_locality"),
        changed=changed[:MOST_CHANGED],
        changed_count=len(changed),
        holding=len(results) - len(failing),
        failing=failing,
        integrity=integrity,
        drift=drift_result(drift),
        repaired=repaired,
        weights_hash=workspace.host.weights_hash,
        seconds=time.monotonic() - started,
        next=" ".join(filter(None, [_next(integrity, failing), workspace.elsewhere])),
    )


def _next(integrity: Integrity, failing: Sequence[str]) -> str:
    if not integrity.weights:
        return (
            "The live weights are not what the ledger says; audit_edits(repair=true) rebuilds the edited tensors, "
            "and starting the server again loads all of them anew."
        )
    if integrity.problems:
        return "The ledger is damaged; integrity.problems names what. Restore the named files from a backup."
    if failing:
        return (
            f"revert_edits({ranges(failing)!r}) takes back those that no longer hold; then apply_edits anew."
        )
    return "Everything holds."


def _records(workspace: Workspace, edit_ids: Sequence[str] | None) -> list[EditRecord]:
    active = workspace.active_edits
    if edit_ids is None:
        return active
    records = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
    known = {record.id for record in active}
    for record in records:
        if record.id not in known:
            raise ServiceError(
                f"{record.id} is {record.status}, so there is nothing to audit; leave edit_ids out to audit all active"
            )
    return records


def _measure(workspace: Workspace, records: Sequence[EditRecord], ctx: RequestContext) -> list[EditOutcome]:
    edits = with_neighbours([edit_of(record) for record in records], workspace.active_subjects)
    ctx.progress(0, 2, "asking the pristine model")
    with workspace.host.pristine():
        materials = collect(workspace, edits) if len(edits) <= MOST_WITH_FORMS else []
        before = observe(workspace.lm, edits, materials=materials)
    ctx.report(1, 2, "asking the live model")
    after = observe(workspace.lm, edits, fluency=True, materials=materials)
    trained = trained_on_by_record(workspace, records, workspace.host.stack)
    measured = outcomes(edits, before, after, workspace.active_subjects, trained, materials)
    return [edit_outcome(e, o, r.id) for e, o, r in zip(edits, measured, records, strict=True)]


def check_integrity(workspace: Workspace) -> Integrity:
    """The ledger's own check, and the hash of the live weights against the one that the stack gives."""
    problems = workspace.ledger.verify()
    expected = workspace.host.weights_hash
    weights = workspace.host.rehash() == expected and _stack_agrees(workspace)
    messages = [str(problem) for problem in problems]
    if not weights:
        messages.append("live weights: they are not pristine weights plus the active patches")
    return Integrity(
        chain=not any(problem.kind != "blob" for problem in problems),
        blobs=not any(problem.kind == "blob" for problem in problems),
        weights=weights,
        problems=messages,
    )


def _stack_agrees(workspace: Workspace) -> bool:
    """True when the live stack is the one on the ledger."""
    stack = workspace.host.stack
    if workspace.model_id is None:
        return not stack
    entries = workspace.ledger.stack(workspace.model_id)
    return [(e.patch_id, e.rows, e.blob) for e in entries] == [(a.patch_id, a.rows, a.blob) for a in stack]
