"""Apply the planned facts in batches, each one transaction under the guard. Facts that fail are tried alone, then
named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors.errors import Cancelled, EditError
from server.errors import ServiceError
from server.facts import applying, editing
from server.facts.edit_request import EditRequest
from server.facts.results import EditReport
from server.factsets.checking import ask
from server.factsets.conflicts import key_of
from server.factsets.phases import CorrectionState
from server.factsets.planning import HandEdits
from server.factsets.run import CorrectionRun
from server.jobs.job import JobContext
from store import fact_key

WATCHED = 32  # facts that were right and are asked after each batch with on_damage="stop"


def apply_batches(work: CorrectionRun, progress: CorrectionState) -> None:
    """Try every planned fact that has no outcome yet."""
    total = sum(map(len, progress.batches)) or 1
    done = 0
    for batch in progress.batches:
        where = (0.15 + 0.65 * done / total, 0.15 + 0.65 * (done + len(batch)) / total)
        done += len(batch)
        left = _left(work, batch)
        if not left:
            continue
        _apply_some(work, progress, left, where, f"facts {done - len(batch) + 1} to {done} of {total}")
        if work.policy.on_damage == "stop" and (lost := _lost_now(work, progress, batch)):
            _stop(work, lost)
            return


def _left(work: CorrectionRun, batch: Sequence[int]) -> list[int]:
    """The facts of a batch without an outcome, after noting those whose edit a killed run had applied already."""
    outcomes = work.outcomes()
    planned = [n for n in batch if n in outcomes and outcomes[n].outcome == "planned"]
    by_key = {
        fact_key(e.subject, e.prompt): e
        for e in work.workspace.active_edits
        if e.request_id == work.job.id  # this job's own
    }
    rows = {}
    for n in planned:
        mine = by_key.get(key_of(work.facts[n]))
        if mine is not None and mine.target == work.facts[n].answer:
            rows[n] = {"outcome": "done", "why": None, "edit_id": mine.id}
    work.note(rows)
    return [n for n in planned if n not in rows]


def _apply_some(
    work: CorrectionRun,
    progress: CorrectionState,
    numbers: Sequence[int],
    where: tuple[float, float],
    what: str,
) -> None:
    """Apply facts together; those that fail are tried alone once."""
    again = _attempt(work, progress, numbers, where, what)
    for n in again if len(numbers) > 1 else ():
        _attempt(work, progress, [n], where, f"fact #{n} alone")


def _attempt(
    work: CorrectionRun,
    progress: CorrectionState,
    numbers: Sequence[int],
    where: tuple[float, float],
    what: str,
) -> list[int]:
    """One transaction; records every outcome that is final and returns the facts that failed."""
    with work.job.live_turn():
        numbers = _still_allowed(work, numbers)
        if not numbers:
            return []
        ctx = JobContext.of(work.job, *where, what)
        _retire(work, progress, numbers, ctx)
        try:
            report = applying.apply(work.workspace, _request(work, numbers), ctx)
        except Cancelled:
            raise
        except (EditError, ServiceError) as error:
            return _failed(work, dict.fromkeys(numbers, str(error)), final=len(numbers) == 1)
        kept = kept_edits(work, numbers, report)
        work.note({n: {"outcome": "done", "why": None, "edit_id": edit_id} for n, edit_id in kept.items()})
    if kept:
        progress.rates.append(_rates(report, len(kept)))
        progress.save(work.job.folder)
    why = {n: _why(work, n, report) for n in numbers if n not in kept}
    return _failed(work, why, final=len(numbers) == 1)


def _request(
    work: CorrectionRun, numbers: Sequence[int], holds: Sequence[tuple[str, str]] = ()
) -> EditRequest:
    policy = work.policy
    return EditRequest(
        [work.facts[n].edit(holds=holds) for n in numbers],
        policy.method,
        policy.params,
        policy.guard,
        replace=True,
        reason=work.reason,
        goal=policy.goal,
        partial=True,
    )


def _still_allowed(work: CorrectionRun, numbers: Sequence[int]) -> list[int]:
    """The facts that are not contradicted by edits made by hand since the plan; the others are skipped and named."""
    if work.policy.hand_edits == "replace":
        return list(numbers)
    hand = HandEdits(work.workspace)
    against = {n: why for n in numbers if (why := hand.against(work.facts[n]))}
    work.note({n: {"outcome": "skipped", "why": why} for n, why in against.items()})
    return [n for n in numbers if n not in against]


def _retire(work: CorrectionRun, progress: CorrectionState, numbers: Sequence[int], ctx: JobContext) -> None:
    """Take back the edits in other words that the policy says the list replaces."""
    ids = [edit_id for n in numbers for edit_id in progress.retire.get(str(n), ())]
    active = {edit.id for edit in work.workspace.active_edits}
    if ids := [edit_id for edit_id in dict.fromkeys(ids) if edit_id in active]:
        editing.revert(work.workspace, ids, f"contradicts {work.reason}", ctx)


def kept_edits(work: CorrectionRun, numbers: Sequence[int], report: EditReport) -> dict[int, str]:
    """The facts whose edits were applied, with the ids."""
    if report.status != "applied":
        return {}
    by_key = {fact_key(e.subject, e.prompt): e.id for e in work.workspace.ledger.edits(report.edit_ids)}
    found = {n: by_key.get(key_of(work.facts[n])) for n in numbers}
    return {n: edit_id for n, edit_id in found.items() if edit_id is not None}


def _why(work: CorrectionRun, number: int, report: EditReport) -> str:
    """Why a fact was not kept: its own failure, else the bound that the call broke."""
    fact = work.facts[number]
    begin = f"{fact.text} -> {fact.answer}: "
    own = next((text.removeprefix(begin) for text in report.left_out if text.startswith(begin)), None)
    if own is None and report.failed_guard:
        own = "; ".join(report.failed_guard)
    return own or "it did not hold"


def _failed(work: CorrectionRun, why: dict[int, str], *, final: bool) -> list[int]:
    if final:
        work.note({n: {"outcome": "failed", "why": text} for n, text in why.items()})
    return list(why)


def _rates(report: EditReport, edits: int) -> dict[str, Any]:
    """What a batch cost and how well it holds, for the totals of the report."""
    return {
        "edits": edits,
        "method": report.method,
        "forms": report.forms,
        "subject_locality": report.subject_locality,
        "locality": report.locality,
    }


def _lost_now(work: CorrectionRun, progress: CorrectionState, batch: Sequence[int]) -> list[int]:
    """Of the facts that were right, those nearest to a batch that are not right any more."""
    subjects = {work.facts[n].subject for n in batch}
    near = sorted(progress.was_right, key=lambda n: work.facts[n].subject not in subjects)[:WATCHED]
    with work.job.live_turn():
        found = ask(work.workspace, work.job, {n: work.facts[n] for n in near})
    return [n for n, check in found.items() if check.verdict != "agrees"]


def _stop(work: CorrectionRun, lost: Sequence[int]) -> None:
    """With on_damage="stop": skip the facts that are not done yet."""
    why = f"stopped: {', '.join(f'#{n}' for n in lost[:5])} is not right any more"
    left = {
        n: {"outcome": "skipped", "why": why} for n, s in work.outcomes().items() if s.outcome == "planned"
    }
    work.note(left)
