"""The job that checks a fact set: every fact is asked, and its verdict is recorded beside that of the check before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from editors.errors import InvalidEdit
from server.facts.asking import check_now
from server.facts.asking_results import FactCheck
from server.facts.remembered import remember_checks
from server.factsets.fact import Fact
from server.factsets.saving import facts_of, has_changed
from server.jobs.job import Job, JobContext
from server.transaction.workspace import Workspace
from store import FactState
from store.canonical import now

KIND = "check_facts"
AT_ONCE = 32  # facts asked in one turn at the model

Asked = dict[int, FactCheck]


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Check the set of the request; returns counts."""
    name = job.request["set"]
    facts = facts_of(workspace.ledger, name)
    check_set(workspace, job, name, facts, 0.0, 1.0)
    return counts_of(states(workspace, name), facts)


def states(workspace: Workspace, name: str) -> dict[int, FactState]:
    """The verdicts of the facts for the loaded model."""
    return workspace.ledger.fact_states(name, workspace.writable_model_id)


def check_set(
    workspace: Workspace, job: Job, name: str, facts: Mapping[int, Fact], start: float, end: float
) -> None:
    """Ask every fact that this job has not asked yet, and record what it finds, some at a time.

    What was asked at the same state of the model is not asked again.
    """
    known = states(workspace, name)
    left = [n for n in facts if n not in known or (known[n].checked or "") < job.created]
    found: Asked = {}
    for done, numbers in _chunks(left):
        job.report(start + (end - start) * done / max(1, len(left)), f"checking {done} of {len(left)} facts")
        found |= _check_some(workspace, job, name, {n: facts[n] for n in numbers}, known)
    if found:
        remember_checks(workspace, list(found.values()), JobContext.of(job))


def ask_again(
    workspace: Workspace,
    job: Job,
    name: str,
    facts: Mapping[int, Fact],
    tell: Callable[[int], None] | None = None,
) -> Asked:
    """Ask facts again in the present state; the verdict of the check before is kept beside the new one."""
    known = {n: state for n, state in states(workspace, name).items() if n in facts}
    found: Asked = {}
    for done, numbers in _chunks(list(facts)):
        if tell is not None:
            tell(done)
        some = {n: facts[n] for n in numbers}
        found |= _check_some(workspace, job, name, some, known, shift=False)
    return found


def _check_some(
    workspace: Workspace,
    job: Job,
    name: str,
    facts: Mapping[int, Fact],
    known: Mapping[int, FactState],
    *,
    shift: bool = True,
) -> Asked:
    """Ask facts in one turn and record the verdicts; with `shift` the former verdict becomes that of before."""
    with job.live_turn():
        state = workspace.state_hash
        again = {n: f for n, f in facts.items() if n not in known or known[n].state_hash != state}
        found = ask(workspace, job, again)
    changes: dict[int, dict[str, Any]] = {}
    for n in facts:
        before = {"was": known[n].verdict} if shift and n in known else {}
        checked = _columns(found.get(n), state) if n in again else {}
        changes[n] = checked | before | {"checked": now()}
    workspace.ledger.put_fact_states(name, workspace.writable_model_id, changes)
    return found


def ask(workspace: Workspace, job: Job, facts: Mapping[int, Fact]) -> Asked:
    """The checks of facts, by number; the caller holds the model. A fact too long to be asked is left out."""
    if not facts:
        return {}
    ctx = JobContext.of(job)
    try:
        checks = check_now(workspace, [fact.query() for fact in facts.values()], ctx).facts
    except InvalidEdit:
        if len(facts) == 1:
            return {}
        return {n: check for n, fact in facts.items() for check in ask(workspace, job, {n: fact}).values()}
    return dict(zip(facts, checks, strict=True))


def _columns(check: FactCheck | None, state: str) -> dict[str, Any]:
    if check is None:
        return {"verdict": "unsure", "answer": "", "p_answer": None, "p_expected": None, "state_hash": state}
    return {
        "verdict": check.verdict,
        "answer": check.answer,
        "p_answer": check.p_answer,
        "p_expected": math.exp(check.expected.logprob),
        "state_hash": state,
    }


def _chunks(numbers: Sequence[int]) -> Iterable[tuple[int, Sequence[int]]]:
    """Numbers in parts, each with how many come before it."""
    return ((i, numbers[i : i + AT_ONCE]) for i in range(0, len(numbers), AT_ONCE))


def counts_of(known: Mapping[int, FactState], facts: Mapping[int, Fact]) -> dict[str, Any]:
    """Verdicts counted, and how many changed since the check before."""
    mine = [known[n] for n in facts if n in known]
    counts = Counter(state.verdict for state in mine if state.verdict)
    return {
        "facts": len(facts),
        **{verdict: counts.get(verdict, 0) for verdict in ("agrees", "differs", "unsure")},
        "changed": sum(has_changed(state) for state in mine),
    }
