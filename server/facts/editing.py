"""Preview, apply, revert and reapply: each is one transaction on host and ledger together.

The order is always the same: compute, put on the live model, measure, judge, record, and only
when the ledger has it on disk does it stand. Whatever fails before that leaves the former stack.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from editors.edit import Edit
from editors.measure import DriftResult, Observation, ask, observe, outcomes
from editors.method import Editor, Params
from editors.patch import Patch, save
from editors.patch_kinds import load
from editors.steering.stack import unsteered
from server.errors import Conflict, ServiceError
from server.facts.auto_method import Choice, choose
from server.facts.guard import Guard
from server.facts.overlap import moved, nearest
from server.facts.reports import (
    failed_bounds,
    mean_rate,
    measured_values,
    next_step,
    outcome_result,
    warnings_of,
)
from server.locating.layers import resolve_auto
from server.request_context import RequestContext
from server.results import Answered, EditOutcome, EditReport, RevertReport
from server.transaction.host import ActivePatch
from server.transaction.workspace import (
    Workspace,
    checked_params,
    digest,
    drift_result,
    editor_named,
    facts_of,
    ordered,
    who,
)
from store import EditRecord, NewPatch

PENDING = 2**62  # position of a patch that the ledger has not seen yet: last
RESTORED_TOKENS = 8  # of what is said again after a revert; most of its time


@dataclass(frozen=True)
class Request:
    """What one call of apply or preview asked for."""

    edits: Sequence[Edit]
    method: str
    params: dict[str, Any] | None
    guard: Guard | None
    replace: bool = False
    reason: str | None = None
    source: str | None = None
    fluency: bool = False
    explain: bool = False  # also say which known facts lie near


@dataclass(frozen=True)
class _Plan:
    editor: Editor[Any]
    why: str
    params: Params
    replaced: list[EditRecord]
    rest: list[ActivePatch]  # the stack without what is replaced
    restack: dict[int, bytes | None]
    notes: tuple[str, ...] = ()  # for the report's warnings


@dataclass(frozen=True)
class _Measured:
    results: list[EditOutcome]
    drift: DriftResult


def apply(workspace: Workspace, request: Request, ctx: RequestContext, *, keep: bool) -> EditReport:
    """Compute, apply, measure, and keep (or, for a preview, never keep)."""
    started = time.monotonic()
    if keep:
        _ = workspace.writable_model_id
    plan = _plan(workspace, request, ctx)
    workspace.prepare(plan.editor, plan.params, ctx)
    hash_before = workspace.host.weights_hash
    before = _observe(workspace, request, ctx, 0.0)
    with workspace.host.trial(plan.rest):
        with unsteered(workspace.lm):  # an edit is the same with steering on or off
            patch = plan.editor.compute(
                workspace.lm, request.edits, plan.params, workspace.context(ctx, 0.1, 0.75)
            )
        data = save(patch)
        near = (
            nearest(workspace, request.edits, patch, [e.id for e in plan.replaced]) if request.explain else []
        )
        new = ActivePatch(
            -1, PENDING, plan.editor.name, patch, tuple(range(len(request.edits))), digest(data)
        )
        workspace.host.set_stack([*plan.rest, new])
        measured = _measure(workspace, request, before, ctx)
        nearby = moved(workspace, near)
        failed = failed_bounds(request.guard, measured.results, measured.drift)
        hash_after, state_hash = workspace.host.weights_hash, workspace.state_hash
        seconds = time.monotonic() - started
        ids: list[str] = []
        if keep:
            ctx.check()
            record = _record(workspace, request, plan, data, patch.kind, measured, hash_before, hash_after)
            record = replace(record, state_hash=state_hash, seconds=seconds)
            if failed:
                workspace.ledger.record_rejected(record, failed, who(ctx))
            else:
                ids = workspace.ledger.record_applied(
                    record, who(ctx), replaced=[e.id for e in plan.replaced], restack=plan.restack
                )
                workspace.host.keep()
                adopt(workspace, plan.rest, new, ids[0])
    status = "previewed" if not keep else "rejected" if failed else "applied"
    report = _report(status, plan, measured, failed, ids, hash_after if ids else hash_before, started)
    return report.model_copy(update={"nearby": nearby})


def _plan(workspace: Workspace, request: Request, ctx: RequestContext) -> _Plan:
    choice = Choice(request.method, "")
    if request.method == "auto":
        choice = choose(workspace.lm, request.edits, workspace.active_subjects)
    editor = editor_named(choice.method)
    for edit in request.edits:
        workspace.lm.edit_prompt(edit)  # the subject has a token of its own, or InvalidEdit
    replaced = _conflicts(workspace, request)
    rest, restack = without(workspace, replaced)
    wanted = {**choice.params, **(request.params or {})}
    given, note = resolve_auto(workspace, editor, wanted, request.edits, rest, ctx)
    params = checked_params(editor, workspace.lm, given)
    return _Plan(editor, choice.why, params, replaced, rest, restack, (note,) if note else ())


def _conflicts(workspace: Workspace, request: Request) -> list[EditRecord]:
    """The active edits the request retires; raises Conflict when it may not."""
    seen: dict[tuple[str, str], Edit] = {}
    for edit in request.edits:
        key = (edit.subject.casefold(), " ".join(edit.text.split()).casefold())
        if key in seen:
            same = (
                "twice"
                if seen[key].target == edit.target
                else f"with {seen[key].target!r} and {edit.target!r}"
            )
            raise Conflict(f"edits has {edit.text!r} {same}; send each fact once")
        seen[key] = edit
    if workspace.model_id is None:
        return []
    active = [
        e
        for edit in request.edits
        for e in workspace.ledger.find_active(workspace.model_id, edit.subject, edit.text)
    ]
    if active and not request.replace:
        old = active[0]
        raise Conflict(
            f"edit {old.id} is active for the same subject and prompt ({old.prompt!r} -> {old.target!r}); call again "
            f'with replace=true to retire it, or revert_edits(["{old.id}"]) first'
        )
    return active


def without(
    workspace: Workspace, edits: Sequence[EditRecord]
) -> tuple[list[ActivePatch], dict[int, bytes | None]]:
    """The stack without some edits, and the new bytes of every patch that changes because of it."""
    gone: dict[int, set[int]] = {}
    for edit in edits:
        gone.setdefault(edit.patch_id, set()).add(edit.row)
    stack: list[ActivePatch] = []
    restack: dict[int, bytes | None] = {}
    for active in workspace.host.stack:
        rows = tuple(r for r in active.rows if r not in gone.get(active.patch_id, ()))
        if rows == active.rows:
            stack.append(active)
        elif rows:
            smaller, data = _with_rows(workspace, active.patch_id, active.method, rows)
            stack.append(replace(active, patch=smaller, rows=rows, blob=digest(data)))
            restack[active.patch_id] = data
        else:
            restack[active.patch_id] = None
    return stack, restack


def _with_rows(workspace: Workspace, patch_id: int, method: str, rows: Sequence[int]) -> tuple[Patch, bytes]:
    """The patch of a call with only some rows active, always made from the full one."""
    full = load(workspace.ledger.blobs.get(workspace.ledger.get_patch(patch_id).source_blob))
    if len(rows) == len(workspace.ledger.batch(patch_id)):
        return full, save(full)
    patch = editor_named(method).subset(full, rows, workspace.statistics)
    return patch, save(patch)


def _observe(workspace: Workspace, request: Request, ctx: RequestContext, at: float) -> Observation:
    ctx.check()
    ctx.progress(at, 1.0, "asking the model")
    return observe(workspace.lm, request.edits, fluency=request.fluency)


def _measure(workspace: Workspace, request: Request, before: Observation, ctx: RequestContext) -> _Measured:
    after = _observe(workspace, request, ctx, 0.87)
    found = outcomes(request.edits, before, after)
    ctx.progress(0.95, 1.0, "measuring drift")
    return _Measured(
        [outcome_result(e, o) for e, o in zip(request.edits, found, strict=True)], workspace.drift()
    )


def _record(
    workspace: Workspace,
    request: Request,
    plan: _Plan,
    data: bytes,
    kind: str,
    measured: _Measured,
    hash_before: str,
    hash_after: str,
) -> NewPatch:
    return NewPatch(
        model_id=workspace.writable_model_id,
        method=plan.editor.name,
        params=plan.params.model_dump(mode="json"),
        kind=kind,
        blob=data,
        requests=[e.model_dump(mode="json") | {"prompt": e.text} for e in request.edits],
        weights_hash_before=hash_before,
        weights_hash_after=hash_after,
        measurements=[measured_values(r) for r in measured.results],
        drift=vars(measured.drift),
        environment=workspace.environment(),
        reason=request.reason,
        source=request.source,
    )


def adopt(workspace: Workspace, rest: Sequence[ActivePatch], new: ActivePatch, first_id: str) -> None:
    """Give the patch on top the place the ledger gave it."""
    patch_id = workspace.ledger.get_edit(first_id).patch_id
    position = workspace.ledger.get_patch(patch_id).position
    workspace.host.stack = (*rest, replace(new, patch_id=patch_id, position=position))


def _report(
    status: Any,
    plan: _Plan,
    measured: _Measured,
    failed: list[str],
    ids: list[str],
    weights_hash: str,
    started: float,
) -> EditReport:
    results = [
        r.model_copy(update={"edit_id": ids[i] if ids else None}) for i, r in enumerate(measured.results)
    ]
    notes = [f"{e.id} was replaced" for e in plan.replaced] if ids else []
    return EditReport(
        status=status,
        edit_ids=ids,
        method=plan.editor.name,
        method_reason=plan.why,
        params=plan.params.model_dump(mode="json"),
        results=results,
        reliability=mean_rate(results, "reliability"),
        generality=mean_rate(results, "generality"),
        locality=mean_rate(results, "locality"),
        portability=mean_rate(results, "portability"),
        drift=drift_result(measured.drift),
        failed_guard=failed,
        weights_hash=weights_hash,
        seconds=time.monotonic() - started,
        warnings=[*notes, *plan.notes, *warnings_of(results, measured.drift)],
        next=next_step(status, results, ids),
    )


# --- revert and reapply --------------------------------------------------------------------------


def revert(
    workspace: Workspace, edit_ids: Sequence[str], reason: str | None, ctx: RequestContext
) -> RevertReport:
    """Take edits back; those that are not active are told and left."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    records = _own(workspace, edit_ids)
    active = [r for r in records if r.status == "active"]
    unchanged = [r.id for r in records if r.status != "active"]
    on_top = workspace.ledger.computed_on_top([r.id for r in active]) if active else []
    restored: list[Answered] = []
    if active:
        stack, restack = without(workspace, active)
        with workspace.host.trial(stack):
            answers = ask(workspace.lm, [r.prompt for r in facts_of(active)], RESTORED_TOKENS)
            restored = [Answered(prompt=p, answer=a) for p, a in answers.items()]
            ctx.check()
            workspace.ledger.record_reverted(
                [r.id for r in active],
                workspace.host.weights_hash,
                who(ctx),
                reason=reason,
                restack=restack,
                state_hash=workspace.state_hash,
            )
            workspace.host.keep()
    return RevertReport(
        reverted=[r.id for r in active],
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
        return (
            f"{', '.join(unchanged)} was not active, so nothing changed there; show_edit tells its history."
        )
    return "reapply_edits brings it back."


def reapply(
    workspace: Workspace, edit_ids: Sequence[str], reason: str | None, ctx: RequestContext
) -> EditReport:
    """Bring edits back from their stored patches, each in its old place."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    records = _own(workspace, edit_ids)
    coming = [r for r in records if r.status != "active"]
    subject_of = coming or records
    edits = [edit_of(r) for r in facts_of(subject_of)]
    _refuse_conflicts(workspace, coming)
    request = Request(edits, records[0].method, None, None)
    before = _observe(workspace, request, ctx, 0.0)
    stack, restack = _with(workspace, coming)
    with workspace.host.trial(stack):
        measured = _measure(workspace, request, before, ctx)
        if coming:
            ctx.check()
            workspace.ledger.record_reapplied(
                [r.id for r in coming],
                workspace.host.weights_hash,
                who(ctx),
                measurements={
                    r.id: measured_values(m) for r, m in zip(facts_of(coming), measured.results, strict=True)
                },
                reason=reason,
                restack=restack,
                state_hash=workspace.state_hash,
                drift=vars(measured.drift),
            )
        workspace.host.keep()
    methods = sorted({r.method for r in records})
    facts = facts_of(subject_of)
    plan = _Plan(editor_named(facts[0].method if facts else "rome"), "", Params(), [], [], {})
    status = "applied" if coming else "unchanged"
    ids = [r.id for r in facts]
    report = _report(status, plan, measured, [], ids, workspace.host.weights_hash, started)
    params = workspace.ledger.get_patch(records[0].patch_id).params
    told = {"method": ", ".join(methods), "params": params, "edit_ids": [r.id for r in subject_of]}
    return report.model_copy(update=told)


def _refuse_conflicts(workspace: Workspace, coming: Sequence[EditRecord]) -> None:
    assert workspace.model_id is not None
    for record in coming:
        for other in workspace.ledger.find_active(workspace.model_id, record.subject, record.prompt):
            raise Conflict(
                f"{record.id} cannot be reapplied: {other.id} is active for the same subject and prompt "
                f'({other.prompt!r} -> {other.target!r}); revert_edits(["{other.id}"]) first'
            )
    keys = [(r.subject.casefold(), " ".join(r.prompt.split()).casefold()) for r in coming]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise Conflict(
                f"{coming[keys.index(key)].id} and {coming[i].id} are about the same subject and prompt; "
                "reapply one of them"
            )


def _with(
    workspace: Workspace, edits: Sequence[EditRecord]
) -> tuple[list[ActivePatch], dict[int, bytes | None]]:
    """The stack with some more rows active, in ledger order."""
    stack = {a.patch_id: a for a in workspace.host.stack}
    restack: dict[int, bytes | None] = {}
    for patch_id in dict.fromkeys(e.patch_id for e in edits):
        record = workspace.ledger.get_patch(patch_id)
        had = stack[patch_id].rows if patch_id in stack else ()
        rows = tuple(sorted({*had, *(e.row for e in edits if e.patch_id == patch_id)}))
        patch, data = _with_rows(workspace, patch_id, record.method, rows)
        stack[patch_id] = ActivePatch(patch_id, record.position, record.method, patch, rows, digest(data))
        restack[patch_id] = data
    return ordered(list(stack.values())), restack


def _own(workspace: Workspace, edit_ids: Sequence[str]) -> list[EditRecord]:
    """The records of distinct ids, all of this model; raises NoSuchEdit or WorkbenchError."""
    if not edit_ids:
        raise ServiceError("edit_ids is empty; name at least one edit (list_edits shows them)")
    records = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
    for record in records:
        if record.model_id != workspace.model_id:
            raise ServiceError(
                f"{record.id} belongs to another model than the one that is loaded; start the server with that model"
            )
    return records


def edit_of(record: EditRecord) -> Edit:
    """The request of a ledger row."""
    known = {k: v for k, v in record.request.items() if k in Edit.model_fields}
    return Edit.model_validate(known)
