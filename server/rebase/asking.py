"""Which of the old facts the new model has right already, in their own words and in others."""

from __future__ import annotations

from collections.abc import Sequence

from editors.errors import InvalidEdit
from editors.measure import observe
from editors.outcomes import outcomes
from server.facts.asking import check_now
from server.facts.asking_results import FactCheck
from server.facts.conflicts import active_conflicts
from server.facts.material import collect
from server.facts.queries import FactQuery
from server.facts.rates import mean_forms
from server.facts.remembered import remember_checks
from server.facts.reports import edit_outcome
from server.facts.trials import are_weak
from server.jobs.job import JobContext
from server.rebase.run import RebaseRun, request_of
from server.rebase.state import LINK, TO_DO
from store import EditRecord
from store.canonical import without_case_and_spacing

AT_ONCE = 16  # facts asked in one turn at the model


def sort_out(work: RebaseRun) -> None:
    """Note of every old fact whether something of this model stands in its place; the others are to do."""
    here = _carried_before(work)
    for old, record in work.old.facts.items():
        if old in work.state.outcomes:
            continue
        before = here.get(old)
        against = active_conflicts(work.workspace, [(record.subject, record.prompt)])
        if before is not None and before.status == "active":
            work.state.note(old, "there", before.id)
        elif against and _same(against[0].target, record.target):
            work.state.note(old, "there", against[0].id)
        elif against:
            say = f"the active edit {against[0].id} of this model says {against[0].target!r} instead"
            work.state.note(old, "left_out", None, f"{say}; revert it and call rebase_edits again")
        elif before is not None:
            taken = f"{before.id}, which carried it over before, was taken back"
            work.state.note(old, "left_out", None, f'{taken}; reapply_edits(["{before.id}"]) brings it back')
        else:
            work.state.note(old, TO_DO)
    work.save()


def _carried_before(work: RebaseRun) -> dict[str, EditRecord]:
    """The edits of this model that earlier rebases made, by the old ids; the active one where there are several."""
    workspace, found = work.workspace, dict[str, EditRecord]()
    for record in workspace.ledger.edits_with(LINK, workspace.writable_model_id):
        old = record.request[LINK]["from"]
        if record.request_id == work.job.id or record.status not in ("active", "reverted"):
            continue
        if old not in found or record.status == "active":
            found[old] = record
    return found


def ask_all(work: RebaseRun) -> None:
    """Ask every fact that is to do; those that the model has right are noted and remembered as such."""
    to_do = [r for r in work.records(TO_DO) if r.id not in work.state.asked]
    for i in range(0, len(to_do), AT_ONCE):
        work.job.report(0.2 * i / len(to_do), f"asking what this model knows already, {i} of {len(to_do)}")
        some = to_do[i : i + AT_ONCE]
        with work.job.live_turn():
            right = _right(work, some)
        for record in some:
            if record.id in right:
                work.state.note(record.id, "right")
        remember_checks(work.workspace, list(right.values()), JobContext.of(work.job))
        work.state.asked += [record.id for record in some]
        work.save()


def _right(work: RebaseRun, records: Sequence[EditRecord]) -> dict[str, FactCheck]:
    """Those that the model says in their own words and in other forms as often as a good edit does."""
    checks = verdicts(work, records)
    agreed = [record for record in records if record.id in checks and checks[record.id].verdict == "agrees"]
    if not agreed:
        return {}
    lm, edits = work.workspace.lm, [request_of(record) for record in agreed]
    materials = collect(work.workspace, edits)
    seen = observe(lm, edits, materials=materials)
    asked = outcomes(edits, seen, seen, materials=materials)
    results = [edit_outcome(edit, outcome) for edit, outcome in zip(edits, asked, strict=True)]
    return {
        record.id: checks[record.id]
        for record, result in zip(agreed, results, strict=True)
        if result.reliability == 1 and not are_weak(mean_forms([result]))
    }


def verdicts(work: RebaseRun, records: Sequence[EditRecord]) -> dict[str, FactCheck]:
    """The verdicts of facts by their old ids; the caller holds the model. One too long to be asked is left out."""
    if not records:
        return {}
    queries = [FactQuery(record.prompt, record.target, record.subject) for record in records]
    try:
        checks = check_now(work.workspace, queries, JobContext.of(work.job)).facts
    except InvalidEdit:
        if len(records) == 1:
            return {}
        return {old: check for record in records for old, check in verdicts(work, [record]).items()}
    return {record.id: check for record, check in zip(records, checks, strict=True)}


def _same(one: str, other: str) -> bool:
    return without_case_and_spacing(one) == without_case_and_spacing(other)
