"""Audits of many edits as a job: some at a time, so that others can ask and edit meanwhile."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from editors.constants import limit
from server.errors import ServiceError
from server.facts.auditing import (
    Depth,
    audit_report,
    audited,
    check_integrity,
    measured_at_this_state,
    record_audit,
    unasked,
)
from server.facts.condensed import condensed
from server.facts.history_results import Audit
from server.facts.ids import expanded
from server.facts.results import EditOutcome
from server.jobs.job import Job, JobContext
from server.jobs.results import JobStarted
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from server.wording import counted

KIND = "audit_edits"
AT_ONCE = limit(
    48,
    "edits that an audit asks in one call, at most",
    "the client's wait: some 20 s on two cores; more are asked by a job",
)
FULL_AT_ONCE = limit(
    8,
    "the same when every form is asked",
    "the client's wait: about half a minute on two cores; more are asked by a job",
)
MOST_BEGUN = 5  # how often an audit starts again when edits change meanwhile
CHUNK = 16  # edits asked in one turn at the model


def left_for_a_job(workspace: Workspace, edit_ids: Sequence[str] | None, depth: Depth) -> int:
    """How many edits an audit must ask; 0 where that is short enough for a call. Raises ServiceError as audit does."""
    ids = None if edit_ids is None else expanded(edit_ids)
    left = len(unasked(workspace, audited(workspace, ids), depth))
    return 0 if left <= (FULL_AT_ONCE if depth.full else AT_ONCE) else left


def started(workspace: Workspace, job: JobStarted, edits: int) -> Audit:
    """The answer of a call whose work is done by a job."""
    return Audit(
        summary=f"{counted(edits, 'edit')} are asked by job {job.job_id}; nothing is counted yet.",
        job_id=job.job_id,
        edits=[],
        holding=0,
        failing=[],
        weights_hash=workspace.host.weights_hash,
        seconds=0.0,
        next=job.next
        if job.state == "interrupted"
        else f'get_job("{job.job_id}", wait_seconds=300) waits for it; its result is the audit.',
    )


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Ask the edits of the request in chunks. The audit is of one state: after a change of the model it begins again.

    Raises ServiceError when there is one change after another.
    """
    began = time.monotonic()
    given = job.request["edit_ids"]
    ids = None if given is None else expanded(given)
    depth, ctx = Depth(job.request["full"], job.request["fluency"]), _quiet(job)
    with job.live_turn():
        trusted = check_integrity(workspace).weights
    state, found, asked, begun = "", dict[str, EditOutcome](), 0, 0
    while True:
        with job.live_turn():
            if workspace.state_hash != state:
                state, found, asked, begun = workspace.state_hash, {}, 0, begun + 1
                if begun > MOST_BEGUN:
                    raise ServiceError(
                        f"the edits were changed {MOST_BEGUN} times while they were asked; name fewer of them in "
                        "edit_ids, or audit when nobody edits"
                    )
            records = audited(workspace, ids)
            chunk = [record for record in records if record.id not in found][:CHUNK]
            if not chunk:
                results = [found[record.id] for record in records]
                seconds = time.monotonic() - began
                report = audit_report(workspace, results, asked, check_integrity(workspace), [], seconds)
                return condensed(report, "full" if depth.full else "brief").model_dump(mode="json")
            new, outcomes = measured_at_this_state(workspace, chunk, ctx, depth, trusted)
            record_audit(workspace, new, outcomes, ctx, trusted)
            found |= {record.id: outcome for record, outcome in zip(chunk, outcomes, strict=True)}
            asked += len(new)
        job.report(len(found) / len(records), f"asked {len(found)} of {counted(len(records), 'edit')}")


def _quiet(job: Job) -> JobContext:
    """The request context of the job, without the progress of its parts."""
    return replace(JobContext.of(job), progress=RequestContext().progress)
