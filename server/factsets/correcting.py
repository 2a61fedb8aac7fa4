"""The job that puts a fact set right: check, plan, apply in batches, check again, mend what was damaged, report.

It can be killed at any moment. What is applied stands on the ledger as edits and is not applied twice: a fact whose
edit is active is done. What is planned stands in the job's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import ServiceError
from server.factsets.batches import apply_batches
from server.factsets.checking import ask_again, check_set, states
from server.factsets.damage import lost_facts, mend
from server.factsets.fact import Fact
from server.factsets.phases import CorrectionState
from server.factsets.planning import CorrectionPlan, batches_of, make_plan
from server.factsets.probing import probe_rates
from server.factsets.reporting import planned_report, report
from server.factsets.requests import Policy
from server.factsets.run import CorrectionRun
from server.factsets.saving import facts_of
from server.jobs.job import Job
from server.transaction.workspace import Workspace
from store import Ledger

KIND = "correct_facts"


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Correct the set of the request, or with approve="ask" only plan it; returns the report."""
    name = job.request["set"]
    version = workspace.ledger.fact_set(name).version
    work = CorrectionRun(
        workspace, job, name, facts_of(workspace.ledger, name), Policy.model_validate(job.request["policy"])
    )
    progress = CorrectionState.load(job.folder)
    if progress is None:
        progress = _begin(work, version)
        if job.request["approve"] == "ask":
            return planned_report(work, version)
    if progress.version != version:
        raise ServiceError(
            f"set {name!r} was saved as version {version} while this job stood still; call correct_facts again"
        )
    if not progress.applied:
        apply_batches(work, progress)
        progress.applied = True
        progress.save(job.folder)
    return _finish(work, progress)


def carried_out_by(ledger: Ledger, plan: str) -> str | None:
    """The job that carried a plan out, if one did."""
    jobs = ledger.list_jobs(limit=1000)
    return next((j.id for j in jobs if j.request.get("plan_of") == plan and j.state == "done"), None)


def _begin(work: CorrectionRun, version: int) -> CorrectionState:
    """Check and plan, or take up the plan of another job that was approved; nothing is changed yet."""
    job, planned_by = work.job, work.job.request.get("plan_of")
    if planned_by is None:
        check_set(work.workspace, job, work.name, work.facts, 0.0, 0.15)
        known = states(work.workspace, work.name)
        plan = make_plan(work.workspace, work.facts, known, work.policy)
        _note(work, plan)
        batches, retire = plan.batches, {str(n): ids for n, ids in plan.retire.items()}
    else:
        known = states(work.workspace, work.name)
        mine = {n: state for n, state in known.items() if state.job_id == planned_by}
        work.note({n: {"outcome": state.outcome, "why": state.why} for n, state in mine.items()})
        wanted = [n for n, state in mine.items() if state.outcome == "planned"]
        batches, retire = batches_of(work.facts, wanted, work.policy.batch), _retired(work, wanted)
    right = [n for n in work.facts if n in known and known[n].verdict == "agrees"]
    answers = {str(n): known[n].answer or "" for n in work.facts if n in known}
    with job.live_turn():
        perplexity = work.workspace.drift().perplexity_after
    progress = CorrectionState(version, batches, retire, right, answers, perplexity)
    progress.save(job.folder)
    return progress


def _retired(work: CorrectionRun, wanted: list[int]) -> dict[str, list[str]]:
    known = states(work.workspace, work.name)
    facts: dict[int, Fact] = {n: work.facts[n] for n in wanted}
    return {str(n): ids for n, ids in make_plan(work.workspace, facts, known, work.policy).retire.items()}


def _note(work: CorrectionRun, plan: CorrectionPlan) -> None:
    """Every fact's part in the plan, on the ledger."""
    rows: dict[int, dict[str, Any]] = {n: {"outcome": "planned", "why": None} for n in plan.numbers}
    rows |= {n: {"outcome": "skipped", "why": why} for n, why in plan.skipped.items()}
    for n, edit_id in plan.right.items():
        rows[n] = {"outcome": "right", "why": f"edit {edit_id} says it" if edit_id else None}
    work.note(rows)


def _finish(work: CorrectionRun, progress: CorrectionState) -> Mapping[str, Any]:
    """Ask the whole set again, mend or name what was lost, and report."""
    total = len(work.facts)
    ask_again(
        work.workspace,
        work.job,
        work.name,
        work.facts,
        lambda done: work.job.report(
            0.8 + 0.1 * done / max(1, total), f"asking {done} of {total} facts again"
        ),
    )
    if lost := lost_facts(work, progress):
        mend(work, progress, lost)
    rates = probe_rates(work)
    return report(work, progress, rates)
