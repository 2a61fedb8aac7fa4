"""The service of jobs: start trainings and statistics, show them, cancel them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from server.engines import job as pushing
from server.errors import ServiceError
from server.facts.auditing import Depth
from server.facts.history_results import Audit
from server.factsets import checking, correcting
from server.jobs import audits, calibration, statistics, training
from server.jobs.job import is_paused
from server.jobs.picture import curves
from server.jobs.results import JobInfo, JobList, JobRow, JobStarted
from server.jobs.runner import PENDING, JobRunner, Work
from server.rebase import job as rebasing
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from store import JobRecord
from store.canonical import json_value

WORK: dict[str, Work] = {
    training.KIND: training.run,
    statistics.KIND: statistics.run,
    calibration.KIND: calibration.run,
    checking.KIND: checking.run,
    correcting.KIND: correcting.run,
    rebasing.KIND: rebasing.run,
}
"""What each kind of job does. A new kind is one module with `KIND`, `check` and `run`, and one line here."""

PUSHES: dict[str, Work] = {pushing.KIND: pushing.run, audits.KIND: audits.run}
"""Kinds that run beside the others: neither an engine nor an audit must wait for a training."""

LOOK = 0.2
"""Seconds between two looks at a job that is waited for."""
CANCEL_SECONDS = 30.0
"""How long cancel waits for the running step to end."""


class JobService:
    """Long work in the background. No call waits for the model's lock."""

    def __init__(self, workspace: Workspace, work: Mapping[str, Work] = WORK) -> None:
        self._workspace = workspace
        self._runner = None if workspace.read_only else JobRunner(workspace, work)
        self._pusher = None if workspace.read_only else JobRunner(workspace, PUSHES)

    @property
    def _runners(self) -> list[JobRunner]:
        return [runner for runner in (self._runner, self._pusher) if runner is not None]

    def resume(self) -> None:
        """Resume the jobs that were running or waiting when the last server ended."""
        if self._runner is None or self._pusher is None:
            return
        self._workspace.ledger.interrupt_running_jobs()
        pending = {
            job.kind for state in PENDING for job in self._workspace.ledger.list_jobs(state, limit=1000)
        }
        self._pusher.resume(left_to_others=pending - set(PUSHES))
        self._runner.resume(left_to_others=set(PUSHES))

    def stop(self) -> None:
        """End the running jobs at their next step and keep them for the next start."""
        for runner in self._runners:
            runner.stop()

    @property
    def runner(self) -> JobRunner:
        """Raises ReadOnly or ServiceError on a server that runs no jobs."""
        _ = self._workspace.writable_model_id
        if self._runner is None:
            raise ServiceError("this server runs no jobs; start it without --read-only")
        return self._runner

    def train_editor(
        self,
        method: str,
        data: str,
        params: Mapping[str, Any] | None = None,
        ctx: RequestContext | None = None,
    ) -> JobStarted:
        """Check the request completely, then start a training. Raises EditError or ServiceError."""
        runner = self.runner
        request = training.check(self._workspace, method, data, params)
        return self._submit(runner, training.KIND, request, ctx)

    def compute_statistics(
        self,
        layers: Sequence[int] | None = None,
        tokens: int | None = None,
        corpus: str | None = None,
        ctx: RequestContext | None = None,
    ) -> JobStarted:
        """Start computing second moments. Raises EditError or ServiceError for what is not there."""
        runner = self.runner
        request = statistics.check(self._workspace, layers, tokens, corpus)
        return self._submit(runner, statistics.KIND, request, ctx)

    def push_edits(
        self, engine: str, leave_out: bool = False, ctx: RequestContext | None = None
    ) -> JobStarted:
        """Start pushing the active edits to an engine. Raises ServiceError for what cannot be pushed."""
        _ = self.runner
        request = pushing.check(self._workspace, engine, leave_out)
        assert self._pusher is not None
        return self._submit(self._pusher, pushing.KIND, request, ctx)

    def audit(
        self,
        edit_ids: Sequence[str] | None = None,
        fluency: bool = False,
        full: bool = False,
        ctx: RequestContext | None = None,
    ) -> Audit | None:
        """Start an audit that is too long for a call; None where it is not, or the server runs no jobs."""
        if self._pusher is None:
            return None
        left = audits.left_for_a_job(self._workspace, edit_ids, Depth(full, fluency))
        if left == 0:
            return None
        request = {"edit_ids": edit_ids and list(edit_ids), "full": full, "fluency": fluency}
        job = self._submit(self._pusher, audits.KIND, request, ctx)
        return audits.started(self._workspace, job, left)

    def calibrate_editing(
        self, methods: Sequence[str] | None = None, facts: int = 16, ctx: RequestContext | None = None
    ) -> JobStarted:
        """Start finding the parameters that fit this model. Raises EditError or ServiceError."""
        runner = self.runner
        return self._submit(runner, calibration.KIND, calibration.check(self._workspace, methods, facts), ctx)

    def get(self, job_id: str) -> JobInfo:
        """One job. Raises NoSuchJob."""
        record = self._workspace.ledger.get_job(job_id)
        return JobInfo(
            **_row(record).model_dump(),
            request=record.request,
            metrics=record.metrics,
            eta_seconds=record.eta_seconds if record.state == "running" else None,
            result=record.result,
            next=_next(record, self._workspace),
        )

    def curves(self, job: JobInfo) -> bytes | None:
        """The curves of a training as PNG; None when there are no points yet."""
        return curves(job) if job.metrics else None

    def list(self, state: str | None = None, limit: int = 20) -> JobList:
        """Jobs, newest first."""
        return JobList(jobs=[_row(record) for record in self._workspace.ledger.list_jobs(state, limit)])

    def cancel(self, job_id: str) -> JobInfo:
        """End a job and wait until its step is over."""
        runner = self._runner_of(job_id)
        runner.cancel(job_id)
        runner.settled(job_id, CANCEL_SECONDS)
        return self.get(job_id)

    def pause(self, job_id: str) -> JobInfo:
        """Pause a job until `go_on`. It keeps what it did. Waits until its present step is over."""
        runner = self._runner_of(job_id)
        runner.pause(job_id)
        runner.settled(job_id, CANCEL_SECONDS)
        return self.get(job_id)

    def go_on(self, job_id: str) -> JobInfo:
        """Let a paused job go on. Raises ServiceError for one of another model."""
        self._runner_of(job_id).go_on(job_id)
        return self.get(job_id)

    def _runner_of(self, job_id: str) -> JobRunner:
        """Raises NoSuchJob, or as `runner`."""
        runner = self.runner
        return self._pusher or runner if self._workspace.ledger.get_job(job_id).kind in PUSHES else runner

    def start(self, kind: str, request: Mapping[str, Any], ctx: RequestContext | None = None) -> JobStarted:
        """Start a job, or name the one that does the same and is not over. Raises ReadOnly or ServiceError."""
        return self._submit(self.runner, kind, request, ctx)

    async def wait(self, job_id: str, seconds: float, ctx: RequestContext) -> JobRecord:
        """Wait without a thread until a job is over or the time is up, and report its progress. Raises NoSuchJob."""
        end = time.monotonic() + seconds
        while True:
            record = await asyncio.to_thread(self._workspace.ledger.get_job, job_id)
            if record.state not in ("queued", "running") or time.monotonic() >= end:
                return record
            ctx.report(record.progress, 1.0, record.message or record.state)
            await asyncio.sleep(LOOK)

    def _same(self, kind: str, request: Mapping[str, Any]) -> JobRecord | None:
        """The unfinished job that does the same; never a push, because each takes the edits of its own moment."""
        if kind == pushing.KIND:
            return None
        for state in ("running", "queued", "interrupted"):
            for record in self._workspace.ledger.list_jobs(state, limit=1000):
                if state == "interrupted" and not is_paused(self._workspace, record.id):
                    continue
                theirs = {name: record.request.get(name) for name in request}
                if record.kind == kind and theirs == json_value(request):
                    return record
        return None

    def _submit(
        self, runner: JobRunner, kind: str, request: Mapping[str, Any], ctx: RequestContext | None
    ) -> JobStarted:
        if same := self._same(kind, request):
            return JobStarted(
                job_id=same.id,
                state=same.state,
                kind=kind,
                message=same.message if same.state == "interrupted" else "this is being done already",
                next=_next(same, self._workspace),
            )
        if ctx is not None and ctx.identity is not None:
            request = {**request, "identity": ctx.identity}
        record = runner.submit(kind, request, ctx.client if ctx else None)
        return JobStarted(
            job_id=record.id,
            state=record.state,
            kind=record.kind,
            message=record.message,
            next=f'get_job("{record.id}") shows its progress; asking goes on meanwhile'
            + ("." if kind == pushing.KIND else ", and so does editing."),
        )


def _row(record: JobRecord) -> JobRow:
    return JobRow(
        job_id=record.id,
        kind=record.kind,
        method=record.request.get("method"),
        state=record.state,
        progress=record.progress,
        message=record.message,
        created=record.created,
        finished=record.finished,
    )


def _after_correction(record: JobRecord, workspace: Workspace) -> str:
    """What its report says to do next; of a plan, only while it can still be carried out."""
    result, name = record.result or {}, record.request["set"]
    if result.get("status") != "planned":
        return str(result.get("next") or f'show_fact_set("{name}") has every fact.')
    if done := correcting.carried_out_by(workspace.ledger, record.id):
        return f'This plan was carried out by {done}: get_job("{done}") has its report.'
    if result.get("version") != workspace.ledger.fact_set(name).version:
        return f'The set was saved again: this plan is invalid. correct_facts("{name}", approve="ask") makes one.'
    return str(result["next"])


def _next(record: JobRecord, workspace: Workspace) -> str:
    if record.state in ("queued", "running"):
        return "Call get_job again later; cancel_job ends it."
    if record.state == "interrupted":
        if record.request.get("model_hash") != workspace.base_hash:
            return f"It continues when the server is started with {record.request.get('model')} again."
        if is_paused(workspace, record.id):
            return f'cancel_job("{record.id}", action="resume") lets it go on.'
        return "It continues by itself when the server is started again."
    if record.state == "done" and record.kind == training.KIND:
        return f'apply_edits with method="{record.request["method"]}" uses what was trained.'
    if record.state == "done" and record.kind == pushing.KIND:
        return f'audit_edits(engine="{record.request["engine"]}") repeats the proof later.'
    if record.state == "done" and record.kind == calibration.KIND:
        return "apply_edits uses these parameters from now on where a call names none."
    if record.state == "done" and record.kind == correcting.KIND:
        return _after_correction(record, workspace)
    if record.state == "done" and record.kind == rebasing.KIND:
        return str((record.result or {}).get("next", ""))
    if record.state == "done" and record.kind == checking.KIND:
        return f'show_fact_set("{record.request["set"]}") has every fact.'
    if record.state == "failed":
        return "Correct what the message says and start it again."
    return ""
