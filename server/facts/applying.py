"""Preview and apply edits: plan, compute and measure, try other ways, keep what holds. One transaction a call."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from editors.edit import Edit
from editors.errors import InvalidEdit
from server.errors import Conflict, ServiceError
from server.facts.apply_report import ApplyPlan, Tried, apply_report
from server.facts.auto_method import Way, refuse_long, taking, ways
from server.facts.conflicts import (
    active_conflicts,
    contradictions,
    describe_conflict,
    refuse_repeated,
)
from server.facts.edit_request import AUTO, EditRequest
from server.facts.guard import Goal, Guard
from server.facts.layer_trials import remember_choice, resolve_auto_layer
from server.facts.measuring import Before, ask_before
from server.facts.overlap import answers_now, nearest_facts
from server.facts.previews import Previews
from server.facts.reports import measured_values, untaught
from server.facts.results import EditReport, Nearby
from server.facts.trials import MOST_TRIALS, Trials, TrialsOfCall, try_way
from server.facts.warnings import missed
from server.methods import checked_params, editor_named
from server.request_context import RequestContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, who
from store import EditRecord, NewPatch

MOST_BEFORE = 4
"""Calls whose answers before the edits are kept."""


def as_previewed(request: EditRequest, previewed: EditRequest) -> EditRequest:
    """The previewed request with this one's guard, reason, source and `replace`. Raises ServiceError for other
    arguments that differ from the preview.
    """
    given = {
        "edits": request.edits or previewed.edits,
        "method": previewed.method if request.method == AUTO else request.method,
        "params": previewed.params if request.params is None else request.params,
        "goal": previewed.goal if request.goal == "everywhere" else request.goal,
        "partial": request.partial or previewed.partial,
    }
    for name, value in given.items():
        if value != getattr(previewed, name):
            raise ServiceError(
                f"{name} is not what it was in that preview; leave {name} out to keep the preview, or leave "
                f"preview_id out to compute again"
            )
    return replace(
        previewed, guard=request.guard, replace=request.replace, reason=request.reason, source=request.source
    )


@dataclass(frozen=True)
class Previewed:
    """What a preview computed, and the state it did so in."""

    request: EditRequest
    plan: ApplyPlan
    result: Tried
    nearby: list[Nearby]
    watched: int  # active edits that were asked before and after
    state_hash: str
    seconds: float


def preview(
    workspace: Workspace, request: EditRequest, ctx: RequestContext, previews: Previews[Previewed]
) -> EditReport:
    """Compute, apply and measure. The model stays as it was; the patch is kept, so that apply need not compute it
    again."""
    return _apply(workspace, request, ctx, previews)


def apply(workspace: Workspace, request: EditRequest, ctx: RequestContext) -> EditReport:
    """Compute, apply and measure, and keep the result if the guard's bounds hold."""
    _ = workspace.writable_model_id
    return _apply(workspace, request, ctx)


def apply_previewed(
    workspace: Workspace, kept: Previewed, request: EditRequest, ctx: RequestContext
) -> EditReport:
    """Keep what a preview computed. Nothing is computed or asked again: the model's state is that of the preview.

    Of `request` the guard (judged on what the preview measured), `replace`, reason and source count. Raises Conflict
    when the state is another.
    """
    started = time.monotonic()
    _ = workspace.writable_model_id
    if workspace.state_hash != kept.state_hash:
        raise _changed_since(kept, workspace.state_hash)
    replaced = _replaced(workspace, request)
    plan = replace(kept.plan, replaced=replaced, base=without(workspace, replaced))
    trial = kept.result.trial
    if request.guard is not None:
        trial = replace(trial, failed=trial.judged(_guard(workspace, request, kept.watched)))
    with Transaction(workspace) as tx:
        tx.retry(plan.base.stack)
        staged = tx.add(trial.editor.name, trial.patch, len(kept.result.rows), trial.staged.data)
        if (
            staged.state_hash != trial.staged.state_hash
        ):  # its edits would replace other edits than in the preview
            raise _changed_since(kept, staged.state_hash)
        result = replace(kept.result, trial=replace(trial, staged=staged))
        ids = _keep(tx, request, plan, result, kept.seconds, ctx)
    status = "rejected" if trial.failed else "applied"
    return apply_report(workspace, request, plan, result, kept.nearby, status, ids, started)


def _changed_since(kept: Previewed, now: str) -> Conflict:
    return Conflict(
        f"the model has changed since that preview (state {kept.state_hash[:12]} then, {now[:12]} now), so what it "
        "measured is not what you would get; call preview_edits again, or apply_edits with recompute=true"
    )


def _guard(workspace: Workspace, request: EditRequest, watched: int) -> Guard:
    guard = request.guard or Guard()
    return guard.standing(len(request.edits), watched) if workspace.settings.bounds == "standing" else guard


def _apply(
    workspace: Workspace,
    request: EditRequest,
    ctx: RequestContext,
    previews: Previews[Previewed] | None = None,
) -> EditReport:
    """With `previews` the model stays as it was, and what was computed is kept there."""
    started = time.monotonic()
    plan = _plan(workspace, request, ctx)
    workspace.prepare(editor_named(plan.ways[0].method), plan.params, ctx)
    before = _before(workspace, request, plan, ctx)
    guard, state_hash = _guard(workspace, request, len(before.watched)), workspace.state_hash
    ids: list[str] = []
    with Transaction(workspace) as tx:
        job = TrialsOfCall(
            workspace,
            request.edits,
            before,
            plan.base.stack,
            not plan.replaced,
            guard,
            ctx,
            frozenset(request.params or ()),
        )
        result = _try_all(tx, job, plan, request)
        trial = result.trial
        nearby = _nearby(tx, job, plan, result) if request.explain else []
        if previews is None:
            ids = _keep(tx, request, plan, result, time.monotonic() - started, ctx)
    if trial.way is plan.ways[0]:
        remember_choice(workspace, trial.editor, plan.layer, ctx)
    status = "previewed" if previews is not None else "rejected" if trial.failed else "applied"
    report = apply_report(workspace, request, plan, result, nearby, status, ids, started)
    if previews is None:
        return report
    seconds = time.monotonic() - started
    kept = Previewed(request, plan, result, nearby, len(before.watched), state_hash, seconds)
    return report.model_copy(update={"preview_id": previews.keep(kept, len(trial.staged.data))})


def _before(workspace: Workspace, request: EditRequest, plan: ApplyPlan, ctx: RequestContext) -> Before:
    """What the model says before the edits. The same edits in the same state are not asked about twice."""
    asked = json.dumps([edit.model_dump(mode="json") for edit in request.edits], sort_keys=True)
    replaced = tuple(old.id for old in plan.replaced)
    key = (workspace.state_hash, workspace.ledger.position(), asked, replaced, request.judged)
    before: Before | None = workspace.recent.get("before", key)
    if before is None:
        before = ask_before(workspace, request.edits, ctx, 0.0, plan.replaced, request.judged)
        workspace.recent.put("before", key, before, MOST_BEFORE)
    return before


def _keep(
    tx: Transaction,
    request: EditRequest,
    plan: ApplyPlan,
    result: Tried,
    seconds: float,
    ctx: RequestContext,
) -> list[str]:
    """Commit the trial that is on the model, or record that it broke its bounds; returns the ids of its edits."""
    ctx.check()
    record = _record(tx, request, result, seconds)
    if result.trial.failed:
        tx.record_rejected(record, result.trial.failed, who(ctx))
        return []
    kept = {request.edits[i].text for i in result.rows}
    replaced = [old.id for old in plan.replaced if old.prompt in kept or not result.left_out]
    return tx.commit_applied(
        [record], who(ctx), replaced=replaced, restack=plan.base.restack, approval=request.approval
    )


def _plan(workspace: Workspace, request: EditRequest, ctx: RequestContext) -> ApplyPlan:
    found = [Way(request.method, "")]
    if request.method == AUTO:
        found = ways(workspace.lm, request.edits, workspace.subjects_in_weights, request.goal)
        found = taking(found, request.params or {})
        given = {k: v for k, v in (request.params or {}).items() if k != "preset"}
        found = [way._replace(params={**way.params, **given}) for way in found]
    editor = editor_named(found[0].method)
    refuse_for_export(editor.name, request.goal)
    refuse_long(editor, request.edits)
    for edit in request.edits:
        workspace.lm.edit_prompt(edit)  # raises InvalidEdit when the subject has no token of its own
    replaced = _replaced(workspace, request)
    base = without(workspace, replaced)
    wanted = {**found[0].params, **(request.params or {})}
    layer = resolve_auto_layer(workspace, editor, wanted, request.edits, base.stack, ctx)
    params = checked_params(editor, workspace.lm, layer.params)
    first = found[0]._replace(params={**found[0].params, **layer.params} if layer.params else {})
    against = contradictions(workspace, request.edits, replaced)
    return ApplyPlan([first, *found[1:]], params, replaced, base, layer, against)


def refuse_for_export(method: str, goal: Goal) -> None:
    """Raise InvalidEdit for a method whose edits cannot be exported as weights, when the goal is export."""
    if goal == "export" and not editor_named(method).exportable:
        raise InvalidEdit(
            f"method {method!r} changes no weights that can be exported, and goal is 'export'; leave goal out, or "
            "take method='auto'"
        )


def _try_all(tx: Transaction, job: TrialsOfCall, plan: ApplyPlan, request: EditRequest) -> Tried:
    """The best way for all edits; with `partial`, and where some do not hold, for those that do."""
    trials = Trials(tx, job, most=MOST_TRIALS if request.method == AUTO else 1)
    best = trials.run(try_way(tx, job, plan.ways[0], plan.params), iter(plan.ways[1:]))
    tried, rows, left_out = trials.described(), list(range(len(job.edits))), []
    if request.partial and best.failed and len(job.edits) > 1:
        reasons = missed(best.measured.results, job.guard)
        rows = [i for i in rows if i not in reasons]
        if rows and reasons:
            left_out = [f"{job.edits[i].text} -> {job.edits[i].target}: {why}" for i, why in reasons.items()]
            best = try_way(tx, job.only(rows), best.way, best.params)
            tried = [*tried, best.described(kept=True)]
        else:
            rows = list(range(len(job.edits)))
    return Tried(best, tried, rows, left_out, untaught(job.edits, job.before.materials))


def _nearby(tx: Transaction, job: TrialsOfCall, plan: ApplyPlan, result: Tried) -> list[Nearby]:
    """The known facts nearest to the edits, asked without the patch and with it."""
    trial, edits = result.trial, [job.edits[i] for i in result.rows]
    tx.retry(job.stack)
    near = nearest_facts(job.workspace, edits, trial.patch, plan.replaced)
    tx.add(trial.editor.name, trial.patch, len(edits))
    return answers_now(job.workspace, near)


def _record(tx: Transaction, request: EditRequest, result: Tried, seconds: float) -> NewPatch:
    trial, edits = result.trial, [request.edits[i] for i in result.rows]
    return tx.describe(
        trial.staged,
        [{**ledger_request(edit), **request.beside.get(edit.text, {})} for edit in edits],
        trial.params.model_dump(mode="json"),
        measurements=[measured_values(each) for each in trial.measured.results],
        drift=trial.measured.drift,
        seconds=seconds,
        reason=request.reason,
        source=request.source,
    )


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
