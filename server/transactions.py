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
from editors.patch import Patch, load, save
from editors.steering.stack import unsteered
from server.call import Call
from server.choose import Choice, choose
from server.core import Core, checked_params, digest, drift_result, editor_named, facts_of, ordered, who
from server.errors import Conflict, WorkbenchError
from server.guard import Guard
from server.host import Active
from server.layers import resolve_auto
from server.nearby import moved, nearest
from server.reports import (
    failed_bounds,
    mean_rate,
    measured_values,
    next_step,
    outcome_result,
    warnings_of,
)
from server.results import Answered, EditOutcome, EditReport, RevertReport
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
    rest: list[Active]  # the stack without what is replaced
    restack: dict[int, bytes | None]
    notes: tuple[str, ...] = ()  # for the report's warnings


@dataclass(frozen=True)
class _Measured:
    results: list[EditOutcome]
    drift: DriftResult


def apply(core: Core, request: Request, call: Call, *, keep: bool) -> EditReport:
    """Compute, apply, measure, and keep (or, for a preview, never keep)."""
    started = time.monotonic()
    if keep:
        _ = core.writable_model_id
    plan = _plan(core, request, call)
    core.prepare(plan.editor, plan.params, call)
    hash_before = core.host.weights_hash
    before = _observe(core, request, call, 0.0)
    with core.host.trial(plan.rest):
        with unsteered(core.lm):  # an edit is the same with steering on or off
            patch = plan.editor.compute(core.lm, request.edits, plan.params, core.context(call, 0.1, 0.75))
        data = save(patch)
        near = nearest(core, request.edits, patch, [e.id for e in plan.replaced]) if request.explain else []
        new = Active(-1, PENDING, plan.editor.name, patch, tuple(range(len(request.edits))), digest(data))
        core.host.set_stack([*plan.rest, new])
        measured = _measure(core, request, before, call)
        nearby = moved(core, near)
        failed = failed_bounds(request.guard, measured.results, measured.drift)
        hash_after, state_hash = core.host.weights_hash, core.state_hash
        seconds = time.monotonic() - started
        ids: list[str] = []
        if keep:
            call.check()
            record = _record(core, request, plan, data, patch.kind, measured, hash_before, hash_after)
            record = replace(record, state_hash=state_hash, seconds=seconds)
            if failed:
                core.ledger.record_rejected(record, failed, who(call))
            else:
                ids = core.ledger.record_applied(
                    record, who(call), replaced=[e.id for e in plan.replaced], restack=plan.restack
                )
                core.host.keep()
                adopt(core, plan.rest, new, ids[0])
    status = "previewed" if not keep else "rejected" if failed else "applied"
    report = _report(status, plan, measured, failed, ids, hash_after if ids else hash_before, started)
    return report.model_copy(update={"nearby": nearby})


def _plan(core: Core, request: Request, call: Call) -> _Plan:
    choice = Choice(request.method, "")
    if request.method == "auto":
        choice = choose(core.lm, request.edits, core.active_subjects)
    editor = editor_named(choice.method)
    for edit in request.edits:
        core.lm.edit_prompt(edit)  # the subject has a token of its own, or InvalidEdit
    replaced = _conflicts(core, request)
    rest, restack = without(core, replaced)
    wanted = {**choice.params, **(request.params or {})}
    given, note = resolve_auto(core, editor, wanted, request.edits, rest, call)
    params = checked_params(editor, core.lm, given)
    return _Plan(editor, choice.why, params, replaced, rest, restack, (note,) if note else ())


def _conflicts(core: Core, request: Request) -> list[EditRecord]:
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
    if core.model_id is None:
        return []
    active = [
        e for edit in request.edits for e in core.ledger.find_active(core.model_id, edit.subject, edit.text)
    ]
    if active and not request.replace:
        old = active[0]
        raise Conflict(
            f"edit {old.id} is active for the same subject and prompt ({old.prompt!r} -> {old.target!r}); call again "
            f'with replace=true to retire it, or revert_edits(["{old.id}"]) first'
        )
    return active


def without(core: Core, edits: Sequence[EditRecord]) -> tuple[list[Active], dict[int, bytes | None]]:
    """The stack without some edits, and the new bytes of every patch that changes because of it."""
    gone: dict[int, set[int]] = {}
    for edit in edits:
        gone.setdefault(edit.patch_id, set()).add(edit.row)
    stack: list[Active] = []
    restack: dict[int, bytes | None] = {}
    for active in core.host.stack:
        rows = tuple(r for r in active.rows if r not in gone.get(active.patch_id, ()))
        if rows == active.rows:
            stack.append(active)
        elif rows:
            smaller, data = _with_rows(core, active.patch_id, active.method, rows)
            stack.append(replace(active, patch=smaller, rows=rows, blob=digest(data)))
            restack[active.patch_id] = data
        else:
            restack[active.patch_id] = None
    return stack, restack


def _with_rows(core: Core, patch_id: int, method: str, rows: Sequence[int]) -> tuple[Patch, bytes]:
    """The patch of a call with only some rows active, always made from the full one."""
    full = load(core.ledger.blobs.get(core.ledger.get_patch(patch_id).source_blob))
    if len(rows) == len(core.ledger.batch(patch_id)):
        return full, save(full)
    patch = editor_named(method).subset(full, rows, core.statistics)
    return patch, save(patch)


def _observe(core: Core, request: Request, call: Call, at: float) -> Observation:
    call.check()
    call.progress(at, 1.0, "asking the model")
    return observe(core.lm, request.edits, fluency=request.fluency)


def _measure(core: Core, request: Request, before: Observation, call: Call) -> _Measured:
    after = _observe(core, request, call, 0.87)
    found = outcomes(request.edits, before, after)
    call.progress(0.95, 1.0, "measuring drift")
    return _Measured([outcome_result(e, o) for e, o in zip(request.edits, found, strict=True)], core.drift())


def _record(
    core: Core,
    request: Request,
    plan: _Plan,
    data: bytes,
    kind: str,
    measured: _Measured,
    hash_before: str,
    hash_after: str,
) -> NewPatch:
    return NewPatch(
        model_id=core.writable_model_id,
        method=plan.editor.name,
        params=plan.params.model_dump(mode="json"),
        kind=kind,
        blob=data,
        requests=[e.model_dump(mode="json") | {"prompt": e.text} for e in request.edits],
        weights_hash_before=hash_before,
        weights_hash_after=hash_after,
        measurements=[measured_values(r) for r in measured.results],
        drift=vars(measured.drift),
        environment=core.environment(),
        reason=request.reason,
        source=request.source,
    )


def adopt(core: Core, rest: Sequence[Active], new: Active, first_id: str) -> None:
    """Give the patch on top the place the ledger gave it."""
    patch_id = core.ledger.get_edit(first_id).patch_id
    position = core.ledger.get_patch(patch_id).position
    core.host.stack = (*rest, replace(new, patch_id=patch_id, position=position))


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


def revert(core: Core, edit_ids: Sequence[str], reason: str | None, call: Call) -> RevertReport:
    """Take edits back; those that are not active are told and left."""
    started = time.monotonic()
    _ = core.writable_model_id
    records = _own(core, edit_ids)
    active = [r for r in records if r.status == "active"]
    unchanged = [r.id for r in records if r.status != "active"]
    on_top = core.ledger.computed_on_top([r.id for r in active]) if active else []
    restored: list[Answered] = []
    if active:
        stack, restack = without(core, active)
        with core.host.trial(stack):
            answers = ask(core.lm, [r.prompt for r in facts_of(active)], RESTORED_TOKENS)
            restored = [Answered(prompt=p, answer=a) for p, a in answers.items()]
            call.check()
            core.ledger.record_reverted(
                [r.id for r in active],
                core.host.weights_hash,
                who(call),
                reason=reason,
                restack=restack,
                state_hash=core.state_hash,
            )
            core.host.keep()
    return RevertReport(
        reverted=[r.id for r in active],
        unchanged=unchanged,
        weights_hash=core.host.weights_hash,
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


def reapply(core: Core, edit_ids: Sequence[str], reason: str | None, call: Call) -> EditReport:
    """Bring edits back from their stored patches, each in its old place."""
    started = time.monotonic()
    _ = core.writable_model_id
    records = _own(core, edit_ids)
    coming = [r for r in records if r.status != "active"]
    subject_of = coming or records
    edits = [edit_of(r) for r in facts_of(subject_of)]
    _refuse_conflicts(core, coming)
    request = Request(edits, records[0].method, None, None)
    before = _observe(core, request, call, 0.0)
    stack, restack = _with(core, coming)
    with core.host.trial(stack):
        measured = _measure(core, request, before, call)
        if coming:
            call.check()
            core.ledger.record_reapplied(
                [r.id for r in coming],
                core.host.weights_hash,
                who(call),
                measurements={
                    r.id: measured_values(m) for r, m in zip(facts_of(coming), measured.results, strict=True)
                },
                reason=reason,
                restack=restack,
                state_hash=core.state_hash,
                drift=vars(measured.drift),
            )
        core.host.keep()
    methods = sorted({r.method for r in records})
    facts = facts_of(subject_of)
    plan = _Plan(editor_named(facts[0].method if facts else "rome"), "", Params(), [], [], {})
    status = "applied" if coming else "unchanged"
    ids = [r.id for r in facts]
    report = _report(status, plan, measured, [], ids, core.host.weights_hash, started)
    params = core.ledger.get_patch(records[0].patch_id).params
    told = {"method": ", ".join(methods), "params": params, "edit_ids": [r.id for r in subject_of]}
    return report.model_copy(update=told)


def _refuse_conflicts(core: Core, coming: Sequence[EditRecord]) -> None:
    assert core.model_id is not None
    for record in coming:
        for other in core.ledger.find_active(core.model_id, record.subject, record.prompt):
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


def _with(core: Core, edits: Sequence[EditRecord]) -> tuple[list[Active], dict[int, bytes | None]]:
    """The stack with some more rows active, in ledger order."""
    stack = {a.patch_id: a for a in core.host.stack}
    restack: dict[int, bytes | None] = {}
    for patch_id in dict.fromkeys(e.patch_id for e in edits):
        record = core.ledger.get_patch(patch_id)
        had = stack[patch_id].rows if patch_id in stack else ()
        rows = tuple(sorted({*had, *(e.row for e in edits if e.patch_id == patch_id)}))
        patch, data = _with_rows(core, patch_id, record.method, rows)
        stack[patch_id] = Active(patch_id, record.position, record.method, patch, rows, digest(data))
        restack[patch_id] = data
    return ordered(list(stack.values())), restack


def _own(core: Core, edit_ids: Sequence[str]) -> list[EditRecord]:
    """The records of distinct ids, all of this model; raises NoSuchEdit or WorkbenchError."""
    if not edit_ids:
        raise WorkbenchError("edit_ids is empty; name at least one edit (list_edits shows them)")
    records = core.ledger.edits(list(dict.fromkeys(edit_ids)))
    for record in records:
        if record.model_id != core.model_id:
            raise WorkbenchError(
                f"{record.id} belongs to another model than the one that is loaded; start the server with that model"
            )
    return records


def edit_of(record: EditRecord) -> Edit:
    """The request of a ledger row."""
    known = {k: v for k, v in record.request.items() if k in Edit.model_fields}
    return Edit.model_validate(known)
