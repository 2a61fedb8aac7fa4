"""What was done and whether it still holds: list, show, audit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from editors.errors import EditError
from editors.measure import observe, outcomes
from editors.model.deltas import LowRank
from editors.patch import WeightPatch
from editors.patch_kinds import load
from server.errors import ServiceError
from server.facts.editing import edit_of
from server.facts.reports import edit_row, measured_values, outcome_result
from server.locating.remembered import trace_before
from server.request_context import RequestContext
from server.results import Audit, EditDetail, EditOutcome, Event, Integrity, Measurement
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, drift_result, facts_of, who
from store import EditRecord, EventRecord, Ledger
from store.errors import BlobError


def show(ledger: Ledger, edit_id: str) -> EditDetail:
    """Everything the ledger knows of one edit."""
    record = ledger.get_edit(edit_id)
    patch = ledger.get_patch(record.patch_id)
    events = ledger.events_of(edit_id)
    return EditDetail(
        edit=edit_row(record),
        request=record.request,
        params=patch.params,
        patch={
            "patch_id": patch.id,
            "row": record.row,
            "kind": patch.kind,
            "blob": patch.blob,
            "source_blob": patch.source_blob,
            "environment": patch.environment,
            **_describe_blob(ledger, patch.source_blob),
        },
        weights_hash_before=record.weights_hash_before,
        weights_hash_after=record.weights_hash_after,
        batch=[i for i in ledger.batch(patch.id) if i != edit_id],
        replaces=ledger.replaced_edits(edit_id),
        replaced_by=record.replaced_by,
        located=trace_before(ledger, record.subject, record.prompt, events[0].seq) if events else None,
        measurements=[
            Measurement(at=m.at, occasion=m.occasion, values=m.values)
            for m in ledger.measurements_of(edit_id)
        ],
        events=[_event(e) for e in events],
    )


def _describe_blob(ledger: Ledger, blob: str) -> dict[str, Any]:
    try:
        patch = load(ledger.blobs.get(blob))
    except (EditError, BlobError) as error:
        return {"damage": str(error)}
    about: dict[str, Any] = {"bytes": ledger.blobs.size(blob)}
    if isinstance(patch, WeightPatch):
        about["tensors"] = {
            name: {"shape": [d.left.shape[0], d.right.shape[1]], "rank": d.left.shape[1]}
            if isinstance(d, LowRank)
            else {"shape": list(d.delta.shape)}
            for name, d in patch.deltas.items()
        }
    return about


def _event(e: EventRecord) -> Event:
    return Event(
        seq=e.seq,
        at=e.at,
        kind=e.kind,
        client=e.client,
        request_id=e.request_id,
        reason=e.reason,
        payload=e.payload,
        hash=e.hash,
    )


def audit(workspace: Workspace, edit_ids: Sequence[str] | None, repair: bool, ctx: RequestContext) -> Audit:
    """Measure active edits against the pristine model, and check ledger, files and weights."""
    started = time.monotonic()
    integrity = check_integrity(workspace)
    repaired: list[str] = []
    if repair and not integrity.weights:
        workspace.host.rebuild()
        integrity = check_integrity(workspace)
        if integrity.weights:
            repaired.append("the live weights were rebuilt from the pristine ones and the ledger")
    records = facts_of(_active(workspace, edit_ids))
    results = _measure(workspace, records, ctx) if records else []
    drift = workspace.drift()
    if records and not workspace.read_only:
        values = {r.edit_id: measured_values(r) for r in results if r.edit_id}
        workspace.ledger.record_measurements(values, "audit", vars(drift), who(ctx))
    failing = [r.edit_id for r in results if r.reliability < 1 and r.edit_id]
    return Audit(
        edits=results,
        holding=len(results) - len(failing),
        failing=failing,
        integrity=integrity,
        drift=drift_result(drift),
        repaired=repaired,
        weights_hash=workspace.host.weights_hash,
        seconds=time.monotonic() - started,
        next=_advice(integrity, failing),
    )


def _advice(integrity: Integrity, failing: Sequence[str]) -> str:
    if not integrity.weights:
        return (
            "The live weights are not what the ledger says; audit_edits(repair=true) rebuilds the edited tensors, "
            "and starting the server again loads all of them anew."
        )
    if integrity.problems:
        return "The ledger is damaged; integrity.problems names what. Restore the named files from a backup."
    if failing:
        return f"revert_edits({list(failing)!r}) takes back those that no longer hold; then apply_edits anew."
    return "Everything holds."


def _active(workspace: Workspace, edit_ids: Sequence[str] | None) -> list[EditRecord]:
    active = workspace.ledger.active_edits(workspace.model_id) if workspace.model_id is not None else []
    if edit_ids is None:
        return active
    wanted = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
    known = {r.id for r in active}
    for record in wanted:
        if record.id not in known:
            raise ServiceError(
                f"{record.id} is {record.status}, so there is nothing to audit; leave edit_ids out to audit all active"
            )
    return wanted


def _measure(workspace: Workspace, records: Sequence[EditRecord], ctx: RequestContext) -> list[EditOutcome]:
    edits = [edit_of(r) for r in records]
    others = workspace.active_subjects
    ctx.progress(0, 2, "asking the pristine model")
    with workspace.host.pristine():
        before = observe(workspace.lm, edits)
    ctx.check()
    ctx.progress(1, 2, "asking the live model")
    after = observe(workspace.lm, edits, fluency=True)
    found = outcomes(edits, before, after, others)
    return [outcome_result(e, o, r.id) for e, o, r in zip(edits, found, records, strict=True)]


def check_integrity(workspace: Workspace) -> Integrity:
    """The ledger's own check, and the live weights against a fresh rebuild's hash."""
    problems = workspace.ledger.verify()
    claimed = workspace.host.weights_hash
    weights = workspace.host.rehash() == claimed and _stack_agrees(workspace)
    told = [str(p) for p in problems]
    if not weights:
        told.append("live weights: they are not pristine weights plus the active patches")
    return Integrity(
        chain=not any(p.kind != "blob" for p in problems),
        blobs=not any(p.kind == "blob" for p in problems),
        weights=weights,
        problems=told,
    )


def _stack_agrees(workspace: Workspace) -> bool:
    if workspace.model_id is None:
        return not workspace.host.stack
    entries = workspace.ledger.stack(workspace.model_id)
    return [(e.patch_id, e.rows, e.blob) for e in entries] == [_key(a) for a in workspace.host.stack]


def _key(active: ActivePatch) -> tuple[int, tuple[int, ...], str]:
    return active.patch_id, active.rows, active.blob
