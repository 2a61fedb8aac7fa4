"""The service that carries edits of another base over to the model that is loaded, as a job."""

from __future__ import annotations

import asyncio
from typing import Any

from server.errors import ServiceError
from server.facts.edit_request import AUTO
from server.jobs.service import JobService
from server.methods import editor_named
from server.rebase import job as rebasing
from server.rebase.old_base import choose
from server.rebase.requests import SAME, Approve, RebaseWishes
from server.rebase.results import Rebase
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from store import JobRecord


class RebaseService:
    """Edits of another base. No call waits for the model; what needs it is a job."""

    def __init__(self, workspace: Workspace, jobs: JobService) -> None:
        self._workspace, self._jobs = workspace, jobs

    async def rebase(
        self,
        to: str | None,
        from_model: str | None,
        wishes: RebaseWishes,
        approve: Approve,
        plan: str | None,
        seconds: float,
        ctx: RequestContext,
    ) -> Rebase:
        """Carry edits over, or carry out the plan of an earlier call, and wait for it that long.

        Raises ServiceError, NoSuchJob or ReadOnly for what cannot be done, before anything is started.
        """
        request = await asyncio.to_thread(self._request, to, from_model, wishes, approve, plan)
        started = await asyncio.to_thread(self._jobs.start, rebasing.KIND, request, ctx)
        record = await self._jobs.wait(started.job_id, seconds, ctx)
        return rebase_of(record)

    def _request(
        self, to: str | None, from_model: str | None, wishes: RebaseWishes, approve: Approve, plan: str | None
    ) -> dict[str, Any]:
        _ = self._workspace.writable_model_id
        if plan is not None:
            return self._of_plan(plan)
        base = choose(self._workspace, to, from_model)
        if wishes.method not in (SAME, AUTO):
            reason = editor_named(wishes.method).supports(self._workspace.lm)
            if reason is not None:
                raise ServiceError(f"method {wishes.method!r}: {reason}")
        given = wishes.model_dump(mode="json", exclude_unset=True)
        return {"from": base.base_hash, "wishes": given, "approve": approve, "plan_of": None}

    def _of_plan(self, plan: str) -> dict[str, Any]:
        """The request that carries out a plan. Raises NoSuchJob, or ServiceError for a job that is not an open plan."""
        ledger = self._workspace.ledger
        record, result = ledger.get_job(plan), ledger.get_job(plan).result or {}
        planned = record.kind == rebasing.KIND and result.get("status") == "planned"
        if not planned or record.request.get("model_hash") != self._workspace.base_hash:
            raise ServiceError(
                f'plan {plan!r} is no plan for this model; rebase_edits(approve="ask") makes one'
            )
        done = (
            j for j in ledger.list_jobs(limit=1000) if j.request.get("plan_of") == plan and j.state == "done"
        )
        if (carried := next(done, None)) is not None:
            raise ServiceError(f"plan {plan!r} was carried out by {carried.id}; get_job has its report")
        if result.get("state_hash") != self._workspace.state_hash:
            raise ServiceError(
                f'the model has changed since the plan {plan!r}; rebase_edits(approve="ask") makes a new one'
            )
        kept = {name: record.request[name] for name in ("from", "wishes")}
        return {**kept, "approve": "auto", "plan_of": plan}


def rebase_of(record: JobRecord) -> Rebase:
    """The answer of a rebase whose job may still run."""
    if record.state == "done":
        return Rebase.model_validate({"job_id": record.id, **(record.result or {})})
    waits = record.state in ("queued", "running")
    return Rebase(
        job_id=record.id,
        status=record.state,
        summary=record.message,
        next=f'get_job("{record.id}", wait_seconds=300) waits for it; cancel_job ends it, and what was carried stays.'
        if waits
        else "It continues by itself when the server is started with this model again."
        if record.state == "interrupted"
        else "Correct what the summary says and call again.",
    )
