"""Revert and reapply edits. Each is one transaction (see server.transaction.transaction)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from editors.measure import ask
from server.errors import Conflict, ServiceError
from server.facts.advice import after_stored
from server.facts.conflicts import active_conflicts, describe_conflict, repeated
from server.facts.ids import ranges
from server.facts.measuring import ask_before, edit_of, measure, trained_on_by_record
from server.facts.reports import edit_report, measured_values, unheld
from server.facts.results import Answered, EditReport, RevertReport
from server.request_context import RequestContext
from server.transaction.stack import with_edits, without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, fact_edits, who
from store import EditRecord

RESTORED_TOKENS = 8  # generated for each prompt after a revert; asking takes most of a revert's time


def revert(
    workspace: Workspace, edit_ids: Sequence[str], reason: str | None, ctx: RequestContext
) -> RevertReport:
    """Take edits back. Those that are not active are listed as unchanged."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    records = _records_of_this_model(workspace, edit_ids)
    active = [record for record in records if record.status == "active"]
    unchanged = [record.id for record in records if record.status != "active"]
    ids = [record.id for record in active]
    on_top = workspace.ledger.computed_on_top(ids) if active else []
    restored: list[Answered] = []
    if active:
        change = without(workspace, active)
        with Transaction(workspace) as tx:
            tx.stage(change.stack)
            answers = ask(workspace.lm, [record.prompt for record in fact_edits(active)], RESTORED_TOKENS)
            restored = [Answered(prompt=prompt, answer=answer) for prompt, answer in answers.items()]
            ctx.check()
            tx.commit_reverted(ids, who(ctx), restack=change.restack, reason=reason)
    return RevertReport(
        reverted=ids,
        unchanged=unchanged,
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.short_state_hash,
        computed_on_top=on_top,
        restored=restored,
        seconds=time.monotonic() - started,
        next=_after_revert(on_top, unchanged),
    )


def _after_revert(on_top: Sequence[str], unchanged: Sequence[str]) -> str:
    if on_top:
        return f"audit_edits({ranges(on_top)!r}) shows whether the edits computed on top still hold."
    if unchanged:
        return f"{', '.join(ranges(unchanged))} was not active, so nothing changed there; show_edit has its history."
    return "reapply_edits brings it back."


def reapply(
    workspace: Workspace, edit_ids: Sequence[str], reason: str | None, ctx: RequestContext
) -> EditReport:
    """Bring edits back from their stored patches, each in its old place."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    records = _records_of_this_model(workspace, edit_ids)
    coming = [record for record in records if record.status != "active"]
    _refuse_conflicts(workspace, coming)
    reported = coming or records
    facts = fact_edits(reported)
    edits = [edit_of(record) for record in facts]
    before = ask_before(workspace, edits, ctx, 0.0, replaced=() if coming else facts)
    change = with_edits(workspace, coming)
    with Transaction(workspace) as tx:
        tx.stage(change.stack)
        trained = trained_on_by_record(workspace, facts, change.stack)
        measured = measure(workspace, before, ctx, trained=trained)
        if coming:
            ctx.check()
            values = {r.id: measured_values(m) for r, m in zip(facts, measured.results, strict=True)}
            ids = [record.id for record in coming]
            tx.commit_reapplied(
                values, ids, who(ctx), restack=change.restack, drift=measured.drift, reason=reason
            )
    return edit_report(
        status="applied" if coming else "unchanged",
        edit_ids=[record.id for record in reported],
        result_ids=[record.id for record in facts],
        method=", ".join(sorted({record.method for record in records})),
        params=workspace.ledger.get_patch(records[0].patch_id).params,
        measured_results=measured.results,
        drift=measured.drift,
        changed=measured.changed,
        perplexity_ratio=measured.perplexity_ratio,
        notes=unheld(edits, measured.results),
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.short_state_hash,
        seconds=time.monotonic() - started,
        next_step=after_stored(measured.results, [record.id for record in facts]),
    )


def _refuse_conflicts(workspace: Workspace, coming: Sequence[EditRecord]) -> None:
    for record in coming:
        for other in active_conflicts(workspace, [(record.subject, record.prompt)]):
            raise Conflict(
                f"{record.id} cannot be reapplied: {describe_conflict(other)}; "
                f'revert_edits(["{other.id}"]) first'
            )
    if pair := repeated((record.subject, record.prompt) for record in coming):
        raise Conflict(
            f"{coming[pair.first].id} and {coming[pair.second].id} are about the same subject and prompt; "
            "reapply one of them"
        )


def _records_of_this_model(workspace: Workspace, edit_ids: Sequence[str]) -> list[EditRecord]:
    """The records of distinct ids. Raises NoSuchEdit, or ServiceError for an edit of another model."""
    if not edit_ids:
        raise ServiceError("edit_ids is empty; name at least one edit (list_edits shows them)")
    records = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
    for record in records:
        if record.model_id != workspace.model_id:
            raise ServiceError(
                f"{record.id} belongs to another model than the one that is loaded; start the server with that model, "
                "or teach it to this one: apply_edits with its subject, prompt and target (show_edit has them), or "
                "rebase_edits for all of that model"
            )
    return records
