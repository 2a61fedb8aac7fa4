"""What no old patch carries is computed on this model: each call as one call again, what fails alone by method=auto."""

from __future__ import annotations

from collections.abc import Sequence

from editors import METHODS
from editors.errors import Cancelled, EditError
from server.errors import ServiceError
from server.facts import applying
from server.facts.edit_request import AUTO, EditRequest
from server.facts.guard import Goal
from server.facts.results import EditReport
from server.jobs.job import JobContext
from server.rebase.keeping import keep_though_weak
from server.rebase.requests import SAME
from server.rebase.run import RebaseRun, request_of
from server.rebase.state import LINK, TO_DO
from store import EditRecord, fact_key

Span = tuple[float, float]


def compute_anew(work: RebaseRun, start: float = 0.4, end: float = 0.9) -> None:
    """Compute every fact that is to do. What cannot be made to hold is noted as left out, with the reason."""
    groups = work.by_patch(TO_DO)
    done, total = 0, sum(map(len, groups.values()))
    for records in groups.values():
        span = (start + (end - start) * done / total, start + (end - start) * (done + len(records)) / total)
        what = f"computing edits anew, {done + 1} to {done + len(records)} of {total}"
        _compute(work, records, span, what)
        done += len(records)


def _compute(work: RebaseRun, records: Sequence[EditRecord], span: Span, what: str) -> None:
    """One old call as one call, then what is left of it one by one."""
    method = _method(work, records[0])
    failing = _attempt(work, records, method, span, what)
    for record in [r for r in records if r.id in failing]:
        why = failing[record.id]
        if len(records) > 1 or method != AUTO:
            why = _attempt(work, [record], AUTO, span, f"{what}: {record.id} alone").get(record.id, "")
        if why and not keep_though_weak(work, record):
            work.state.note(record.id, "left_out", None, why)
    work.save()


def _method(work: RebaseRun, record: EditRecord) -> str:
    """By which method an old edit is computed: as the call says, or by its own where this model can use it."""
    if work.wishes.method != SAME:
        return work.wishes.method
    editor = METHODS.get(record.method)
    return AUTO if editor is None or editor.supports(work.workspace.lm) else record.method


def _attempt(
    work: RebaseRun, records: Sequence[EditRecord], method: str, span: Span, what: str
) -> dict[str, str]:
    """One transaction; notes what is kept, and returns the old ids that are not, with the reason."""
    links = {r.prompt: {LINK: {"from": r.id, "how": "anew"}} for r in records}
    with work.job.live_turn():
        try:
            request = EditRequest(
                [request_of(record) for record in records],
                method,
                None,
                work.wishes.guard,
                reason=work.reason,
                goal=_goal(work, records[0]) if method == AUTO else "everywhere",
                partial=True,
                beside=links,
            )
            report = applying.apply(work.workspace, request, JobContext.of(work.job, *span, what))
        except Cancelled:
            raise
        except (EditError, ServiceError) as error:
            return {record.id: str(error) for record in records}
        by_key = {}
        if report.status == "applied":
            made = [e for e in work.workspace.active_edits if e.request_id == work.job.id]
            by_key = {fact_key(e.subject, e.prompt): e.id for e in made}
    kept = {r.id: by_key[key] for r in records if (key := fact_key(r.subject, r.prompt)) in by_key}
    for old, edit_id in kept.items():
        work.state.note(old, "anew", edit_id)
    if kept:
        work.state.rates.append(work.rated([result for result in report.results if result.edit_id]))
    work.save()
    return {r.id: _why(r, report) for r in records if r.id not in kept}


def _goal(work: RebaseRun, record: EditRecord) -> Goal:
    """What was in the weights stays in the weights, so that it can be exported as before."""
    return "export" if work.workspace.ledger.get_patch(record.patch_id).kind == "weight" else "everywhere"


def _why(record: EditRecord, report: EditReport) -> str:
    """Why an edit was not kept: its own failure, else the bound that the call broke."""
    begin = f"{record.prompt} -> {record.target}: "
    own = next((text.removeprefix(begin) for text in report.left_out if text.startswith(begin)), None)
    return own or "; ".join(report.failed_guard) or "it did not hold"
