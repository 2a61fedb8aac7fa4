"""The service of fact sets: save, list, show and export them; check and correct them as jobs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from editors.edit import Edit
from server.errors import ServiceError
from server.facts.applying import refuse_for_export
from server.facts.edit_request import AUTO
from server.facts.verdicts import MEANINGS
from server.factsets import checking, correcting, saving
from server.factsets.conflicts import conflicting
from server.factsets.fact import Fact
from server.factsets.requests import Approve, Given, Kind, Policy
from server.factsets.results import (
    Correction,
    ExportedFacts,
    FactSetList,
    FactSetPage,
    FactSetRow,
    SavedFacts,
    SetCheck,
)
from server.factsets.saving import facts_of, has_changed, line, states_of
from server.jobs.results import JobStarted
from server.jobs.service import JobService
from server.methods import checked_params, editor_named
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from server.wording import counted
from store import JobRecord


class FactSetService:
    """Lists of right answers. No call waits for the model; what needs it is a job."""

    def __init__(self, workspace: Workspace, jobs: JobService) -> None:
        self._workspace, self._jobs = workspace, jobs

    def save(self, name: str, given: Given, ctx: RequestContext | None = None) -> SavedFacts:
        """Save facts as the next version of a set. Raises ServiceError."""
        return saving.save(self._workspace, name, given, ctx or RequestContext())

    def gone(self, name: str, given: Given) -> Sequence[Fact]:
        """The facts that saving this would take out of the set. Raises ServiceError."""
        return saving.gone(self._workspace, name, given)

    def list(self) -> FactSetList:
        """Every set, with counts of the last check with this model."""
        rows = []
        for record in self._workspace.ledger.fact_sets():
            states = states_of(self._workspace, record.name)
            counts = Counter(state.verdict for state in states.values() if state.verdict)
            rows.append(
                FactSetRow(
                    name=record.name,
                    version=record.version,
                    facts=record.facts,
                    changed=record.changed,
                    state=dict(sorted(counts.items())),
                )
            )
        return FactSetList(sets=rows)

    def show(
        self,
        name: str,
        kind: Kind | None = None,
        number: int | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> FactSetPage:
        """A page of a set, or one fact in full. Raises NoSuchSet or ServiceError."""
        return saving.page(self._workspace, name, kind, number, limit, cursor)

    def export(self, name: str, file_name: str | None = None) -> ExportedFacts:
        """Write a set as CSV into HOME/exports. Raises NoSuchSet or ServiceError."""
        return saving.export(self._workspace, name, file_name)

    async def check(self, name: str, limit: int, seconds: float, ctx: RequestContext) -> SetCheck:
        """Check a set as a job and wait for it that long. Raises NoSuchSet, ReadOnly or ServiceError."""
        started = await asyncio.to_thread(self.start_check, name, ctx)
        record = await self._jobs.wait(started.job_id, seconds, ctx)
        return await asyncio.to_thread(self._checked, name, record, limit)

    def start_check(self, name: str, ctx: RequestContext) -> JobStarted:
        """Check a set as a job. Raises NoSuchSet, ReadOnly or ServiceError."""
        self._workspace.ledger.fact_set(name)
        return self._jobs.start(checking.KIND, {"set": name}, ctx)

    def edit_of(self, name: str, number: int) -> Edit:
        """The edit that would correct one fact of a set. Raises NoSuchSet or ServiceError."""
        facts = facts_of(self._workspace.ledger, name)
        if number not in facts:
            raise ServiceError(f"set {name!r} has no fact #{number}")
        return facts[number].edit()

    async def correct(
        self,
        name: str,
        policy: Policy,
        approve: Approve,
        plan: str | None,
        seconds: float,
        ctx: RequestContext,
    ) -> Correction:
        """Correct a set as a job, or carry out the plan of an earlier one. Raises NoSuchSet or ServiceError."""
        request = {"set": name, "policy": policy.model_dump(mode="json"), "approve": approve, "plan_of": plan}
        if plan is not None:
            request = await asyncio.to_thread(self._of_plan, name, plan)
        await asyncio.to_thread(self._workspace.ledger.fact_set, name)
        await asyncio.to_thread(self._check_policy, Policy.model_validate(request["policy"]))
        started = await asyncio.to_thread(self._jobs.start, correcting.KIND, request, ctx)
        record = await self._jobs.wait(started.job_id, seconds, ctx)
        return correction(name, record)

    def _check_policy(self, policy: Policy) -> None:
        """Raise for a method or parameters that cannot be used, before anything is started."""
        if policy.method != AUTO:
            refuse_for_export(policy.method, policy.goal)
            checked_params(editor_named(policy.method), self._workspace.lm, policy.params or {})

    def _of_plan(self, name: str, plan: str) -> dict[str, Any]:
        """The request that carries out a plan. Raises NoSuchJob, or ServiceError for a job that is not an open plan."""
        record = self._workspace.ledger.get_job(plan)
        result = record.result or {}
        if record.kind != correcting.KIND or result.get("status") != "planned" or result.get("set") != name:
            raise ServiceError(
                f'plan {plan!r} is no plan for set {name!r}; correct_facts("{name}", approve="ask") makes one'
            )
        version = self._workspace.ledger.fact_set(name).version
        if result.get("version") != version:
            raise ServiceError(
                f"plan {plan!r} is for version {result.get('version')} of {name!r}, which is at {version}; make a new "
                "one"
            )
        if done := correcting.carried_out_by(self._workspace.ledger, plan):
            raise ServiceError(f"plan {plan!r} was carried out by {done}; get_job has its report")
        return {"set": name, "policy": record.request["policy"], "approve": "auto", "plan_of": plan}

    def _checked(self, name: str, record: JobRecord, limit: int) -> SetCheck:
        """The result of a check: counts, then the facts that changed, differ or are unsure."""
        ledger = self._workspace.ledger
        shared = {"name": name, "version": ledger.fact_set(name).version, "job_id": record.id}
        if record.state != "done":
            return SetCheck(
                **shared, state=record.state, summary=record.message, next=still(record.id, record.state)
            )
        facts, known = facts_of(ledger, name), states_of(self._workspace, name)
        counts = checking.counts_of(known, facts)
        order = {"differs": 1, "unsure": 2}
        named = [n for n in facts if n in known and (has_changed(known[n]) or known[n].verdict in order)]
        named.sort(key=lambda n: (not has_changed(known[n]), order.get(known[n].verdict or "", 0)))
        conflicts = sum(map(len, conflicting(facts)))
        words = ", ".join(f"{counts[v]} {v}" for v in ("agrees", "differs", "unsure"))
        also = f"; {conflicts} facts contradict each other" if conflicts else ""
        return SetCheck(
            **shared,
            state="done",
            summary=f"{counted(counts['facts'], 'fact')}: {words}; {counts['changed']} changed since the check before"
            f"{also}.",
            counts=counts,
            facts=[line(n, facts[n], known[n]) for n in named[:limit]],
            meanings=MEANINGS,
            next=_after_check(name, len(named), limit),
        )


def _after_check(name: str, named: int, limit: int) -> str:
    if not named:
        return "Every fact agrees; check again whenever the model or the list changes."
    more = (
        f' {named - limit} more: show_fact_set("{name}", kind="differs" or "unsure").'
        if named > limit
        else ""
    )
    return f'correct_facts("{name}") puts right what is not; approve="ask" shows the plan first.{more}'


def correction(name: str, record: JobRecord) -> Correction:
    """The answer of a correction whose job may still run."""
    if record.state == "done":
        return Correction.model_validate({"job_id": record.id, **(record.result or {})})
    return Correction(
        job_id=record.id,
        status=record.state,
        set=name,
        summary=record.message,
        next=still(record.id, record.state),
    )


def still(job_id: str, state: str) -> str:
    """What to do while a job is not done."""
    if state in ("queued", "running"):
        return f'get_job("{job_id}", wait_seconds=300) waits for it; cancel_job ends it.'
    if state == "interrupted":
        return "It continues by itself when the server is started again."
    return "Correct what the summary says and call again."
