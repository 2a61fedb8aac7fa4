"""Preview, apply, revert and reapply edits. Each is one transaction (see server.transaction.transaction)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from editors.edit import Edit
from editors.measure import ask
from editors.method import Editor, Params
from editors.steering.stack import unsteered
from server.errors import Conflict, ServiceError
from server.facts.advice import after_edit, after_stored
from server.facts.auto_method import MethodChoice, choose_method
from server.facts.conflicts import (
    Contradiction,
    active_conflicts,
    contradictions,
    describe_conflict,
    refuse_repeated,
    repeated,
)
from server.facts.guard import Guard
from server.facts.layer_trials import LayerChoice, remember_choice, resolve_auto_layer
from server.facts.material import collect
from server.facts.measuring import (
    Measured,
    ask_all,
    edit_of,
    measure,
    trained_on,
    trained_on_by_record,
)
from server.facts.overlap import answers_now, nearest_facts
from server.facts.reports import edit_report, failed_bounds, measured_values
from server.facts.results import Answered, EditReport, Nearby, RevertReport
from server.methods import checked_params, editor_named
from server.request_context import RequestContext
from server.transaction.stack import Restacked, with_edits, without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, fact_edits, who
from store import EditRecord

RESTORED_TOKENS = 8  # generated for each prompt after a revert; asking takes most of a revert's time


@dataclass(frozen=True)
class EditRequest:
    """What one call of apply or preview asks for."""

    edits: Sequence[Edit]
    method: str = "auto"
    params: dict[str, Any] | None = None
    guard: Guard | None = None
    replace: bool = False
    reason: str | None = None
    source: str | None = None
    explain: bool = False  # also report the known facts that lie near


@dataclass(frozen=True)
class _Plan:
    """How a request will be carried out: everything that can be refused before the long work."""

    editor: Editor[Any]
    method_reason: str
    params: Params
    replaced: list[EditRecord]
    base: Restacked  # the live stack without what is replaced
    layer: LayerChoice
    contradictions: list[Contradiction]


def preview(workspace: Workspace, request: EditRequest, ctx: RequestContext) -> EditReport:
    """Compute, apply and measure, and keep nothing."""
    return _apply(workspace, request, ctx, keep=False)


def apply(workspace: Workspace, request: EditRequest, ctx: RequestContext) -> EditReport:
    """Compute, apply and measure, and keep the result if the guard's bounds hold."""
    _ = workspace.writable_model_id
    return _apply(workspace, request, ctx, keep=True)


def _apply(workspace: Workspace, request: EditRequest, ctx: RequestContext, *, keep: bool) -> EditReport:
    started = time.monotonic()
    plan = _plan(workspace, request, ctx)
    workspace.prepare(plan.editor, plan.params, ctx)
    before = ask_all(workspace, request.edits, ctx, 0.0)
    ids: list[str] = []
    with Transaction(workspace) as tx:
        tx.stage(plan.base.stack)
        with unsteered(workspace.lm):  # an edit is the same with steering on or off
            context = replace(
                workspace.edit_context(ctx, 0.1, 0.75),
                materials=collect(workspace, request.edits, plan.replaced),
            )
            patch = plan.editor.compute(workspace.lm, request.edits, plan.params, context)
        near = nearest_facts(workspace, request.edits, patch, plan.replaced) if request.explain else []
        staged = tx.add(plan.editor.name, patch, len(request.edits))
        trained = trained_on(plan.editor.name, patch, request.edits, plan.params.model_dump(mode="json"))
        measured = measure(workspace, request.edits, before, ctx, trained=trained)
        nearby = answers_now(workspace, near)
        failed = failed_bounds(request.guard, measured.results, measured.drift)
        if keep:
            ctx.check()
            record = tx.describe(
                staged,
                [ledger_request(edit) for edit in request.edits],
                plan.params.model_dump(mode="json"),
                measurements=[measured_values(result) for result in measured.results],
                drift=measured.drift,
                seconds=time.monotonic() - started,
                reason=request.reason,
                source=request.source,
            )
            if failed:
                tx.record_rejected(record, failed, who(ctx))
            else:
                replaced = [old.id for old in plan.replaced]
                ids = tx.commit_applied([record], who(ctx), replaced=replaced, restack=plan.base.restack)
    remember_choice(workspace, plan.editor, plan.layer, ctx)
    status = "previewed" if not keep else "rejected" if failed else "applied"
    return _apply_report(workspace, request.edits, plan, measured, nearby, status, failed, ids, started)


def _plan(workspace: Workspace, request: EditRequest, ctx: RequestContext) -> _Plan:
    choice = MethodChoice(request.method, "")
    if request.method == "auto":
        choice = choose_method(workspace.lm, request.edits, workspace.active_subjects)
    editor = editor_named(choice.method)
    for edit in request.edits:
        workspace.lm.edit_prompt(edit)  # raises InvalidEdit when the subject has no token of its own
    replaced = _replaced(workspace, request)
    base = without(workspace, replaced)
    wanted = {**choice.params, **(request.params or {})}
    layer = resolve_auto_layer(workspace, editor, wanted, request.edits, base.stack, ctx)
    params = checked_params(editor, workspace.lm, layer.params)
    against = contradictions(workspace, request.edits, replaced)
    return _Plan(editor, choice.reason, params, replaced, base, layer, against)


def _replaced(workspace: Workspace, request: EditRequest) -> list[EditRecord]:
    """The active edits that the request retires. Raises Conflict when it does not say replace=true."""
    refuse_repeated(request.edits)
    active = active_conflicts(workspace, ((edit.subject, edit.text) for edit in request.edits))
    if active and not request.replace:
        raise Conflict(
            f"{describe_conflict(active[0])}; call again with replace=true to retire it, "
            f'or revert_edits(["{active[0].id}"]) first'
        )
    return active


def ledger_request(edit: Edit) -> dict[str, Any]:
    """An edit as the ledger keeps it: with its subject in the prompt."""
    return edit.model_dump(mode="json") | {"prompt": edit.text}


def _apply_report(
    workspace: Workspace,
    edits: Sequence[Edit],
    plan: _Plan,
    measured: Measured,
    nearby: list[Nearby],
    status: str,
    failed: list[str],
    ids: list[str],
    started: float,
) -> EditReport:
    notes = [f"{old.id} was replaced" for old in plan.replaced] if ids else []
    notes += [each.described(edits, ids) for each in plan.contradictions]
    params = plan.params.model_dump(mode="json")
    return edit_report(
        status=status,
        edit_ids=ids,
        method=plan.editor.name,
        method_reason=plan.method_reason,
        params=params,
        measured_results=measured.results,
        drift=measured.drift,
        failed_guard=failed,
        nearby=nearby,
        notes=[*notes, *filter(None, [plan.layer.note])],
        weights_hash=workspace.host.weights_hash,
        seconds=time.monotonic() - started,
        next_step=after_edit(workspace.lm, status, plan.editor.name, params, measured.results, ids, failed),
    )


# --- revert and reapply --------------------------------------------------------------------------


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
        computed_on_top=on_top,
        restored=restored,
        seconds=time.monotonic() - started,
        next=_after_revert(on_top, unchanged),
    )


def _after_revert(on_top: Sequence[str], unchanged: Sequence[str]) -> str:
    if on_top:
        return f"audit_edits({list(on_top)!r}) shows whether the edits computed on top still hold."
    if unchanged:
        return f"{', '.join(unchanged)} was not active, so nothing changed there; show_edit has its history."
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
    before = ask_all(workspace, edits, ctx, 0.0)
    change = with_edits(workspace, coming)
    with Transaction(workspace) as tx:
        tx.stage(change.stack)
        trained = trained_on_by_record(workspace, facts, change.stack)
        measured = measure(workspace, edits, before, ctx, trained=trained)
        if coming:
            ctx.check()
            values = {r.id: measured_values(m) for r, m in zip(facts, measured.results, strict=True)}
            tx.commit_reapplied(
                values,
                [record.id for record in coming],
                who(ctx),
                restack=change.restack,
                drift=measured.drift,
                reason=reason,
            )
    return edit_report(
        status="applied" if coming else "unchanged",
        edit_ids=[record.id for record in reported],
        result_ids=[record.id for record in facts],
        method=", ".join(sorted({record.method for record in records})),
        params=workspace.ledger.get_patch(records[0].patch_id).params,
        measured_results=measured.results,
        drift=measured.drift,
        weights_hash=workspace.host.weights_hash,
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
                "or teach it to this one: apply_edits with its subject, prompt and target (show_edit has them)"
            )
    return records
