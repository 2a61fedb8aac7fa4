"""The job that carries the edits of another base over to the model that is loaded.

It asks which facts this model has right, tries the old patches as they are, computes the others anew, and asks again.
It can be killed at any moment: what was carried stands on the ledger, each new edit naming its old one, and is not
carried twice. The old base and its edits stay on the ledger as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import ServiceError
from server.facts.ids import expanded
from server.jobs.job import Job, JobContext
from server.rebase.anew import compute_anew
from server.rebase.asking import AT_ONCE, ask_all, sort_out, verdicts
from server.rebase.keeping import keep_old
from server.rebase.old_base import read_old_base
from server.rebase.reporting import final_report, planned_report
from server.rebase.requests import RebaseWishes
from server.rebase.run import RebaseRun
from server.rebase.state import TO_DO, RebaseState
from server.transaction.bases import REBASED, elsewhere_note
from server.transaction.workspace import Workspace, who

KIND = "rebase_edits"


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Carry the edits of the request's base over, or with approve="ask" only plan it; returns the report."""
    old = read_old_base(workspace, job.request["from"])
    state = RebaseState.load(job.folder)
    if state is None:
        with job.live_turn():
            state = RebaseState(workspace.drift().perplexity_after)
    work = RebaseRun(workspace, job, old, RebaseWishes.model_validate(job.request["wishes"]), state)
    sort_out(work)
    work.adopt()
    if job.request["plan_of"] is not None:
        _take_up(work)
    ask_all(work)
    if job.request["approve"] == "ask":
        keep_old(work, dry=True)
        return planned_report(work)
    keep_old(work)
    compute_anew(work)
    return _finish(work)


def _take_up(work: RebaseRun) -> None:
    """Take the first part of an approved plan over: what the model has right, and which old patches do not hold."""
    if work.state.asked:
        return
    plan = work.workspace.ledger.get_job(work.job.request["plan_of"]).result or {}
    planned = {name: set(expanded(row["edits"])) for name, row in plan["outcomes"].items()}
    unforeseen = set(work.old.facts) - set().union(*planned.values())
    if unforeseen or plan["state_hash"] != work.workspace.state_hash:
        raise ServiceError(
            'the model or the edits have changed since that plan; rebase_edits(approve="ask") makes a new one'
        )
    for old in work.state.of(TO_DO):
        if old in planned.get("right", ()):
            work.state.note(old, "right")
    work.state.asked = list(work.state.outcomes)
    held = planned.get("kept", set())
    work.state.tried = [n for n, rs in work.by_patch(TO_DO).items() if not held & {r.id for r in rs}]
    work.save()


def _finish(work: RebaseRun) -> Mapping[str, Any]:
    """Ask everything again, mend what was right and is not any more, record the links, and report."""
    lost = _not_said(work)
    if broken := [old for old in lost if work.state.outcomes[old]["outcome"] == "right"]:
        for old in broken:
            work.state.note(old, TO_DO)
        compute_anew(work, 0.92, 0.96)
        lost = _not_said(work)
    with work.job.live_turn():
        perplexity = work.workspace.drift().perplexity_after
    _take_over_sets(work)
    _record(work)
    return final_report(work, lost, perplexity)


def _not_said(work: RebaseRun) -> Sequence[str]:
    """The old ids of facts that are on record here and that the model does not say."""
    lost: list[str] = []
    records = work.records("right", "kept", "anew", "there")
    for i in range(0, len(records), AT_ONCE):
        work.job.report(0.9 + 0.1 * i / len(records), f"asking {i} of {len(records)} facts again")
        some = records[i : i + AT_ONCE]
        with work.job.live_turn():
            checks = verdicts(work, some)
        lost += [r.id for r in some if r.id in checks and checks[r.id].verdict != "agrees"]
    return lost


def _take_over_sets(work: RebaseRun) -> None:
    """The new edits belong to the fact sets that the old ones were made for."""
    ledger, model_id = work.workspace.ledger, work.workspace.writable_model_id
    new = {old: work.state.outcomes[old]["edit"] for old in work.state.of("kept", "anew")}
    for each in ledger.fact_sets():
        theirs = ledger.fact_states(each.name, work.old.model.id)
        rows = {n: {"edit_id": new[s.edit_id]} for n, s in theirs.items() if s.edit_id in new}
        ledger.put_fact_states(each.name, model_id, rows)


def _record(work: RebaseRun) -> None:
    """The outcome of every old edit as one event of this model, which names them."""
    workspace, outcomes = work.workspace, work.state.outcomes
    model_id = workspace.writable_model_id
    if workspace.ledger.last_event(REBASED, {"job": work.job.id}, model_id=model_id) is None:
        payload = {"job": work.job.id, "from": work.old.model.base_hash, "edits": outcomes}
        payload["not_carried"] = [record.id for record in work.old.others]
        workspace.ledger.record_event(
            REBASED,
            payload,
            who(JobContext.of(work.job)),
            model_id=model_id,
            edit_ids=list(outcomes),
            reason=work.reason,
        )
    former = workspace.elsewhere
    workspace.elsewhere = elsewhere_note(workspace.ledger, workspace.lm, model_id)
    workspace.notes[:] = [n for n in [*workspace.notes, workspace.elsewhere] if n and n != former]
