"""Toolset `train`: long work in the background: training editors, computing statistics."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field

from server.jobs.results import ENDED, JobInfo, JobList, JobStarted
from tools._toolset import ToolRequest, Toolset, WaitSeconds

toolset = Toolset("train")

JobId = Annotated[
    str, Field(min_length=1, max_length=64, description='Id of a job, such as "j1"; see list_jobs.')
]


@toolset.tool("Train an editor", takes_turn=False, scope="admin", changes=True)
def train_editor(
    request: ToolRequest,
    method: Annotated[
        Literal["mend", "serac"], Field(description="The learned editor to train for this model.")
    ],
    data: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description='"facts" (the shipped set), or a file or folder in HOME/data.',
        ),
    ] = "facts",
    params: Annotated[
        dict[str, Any] | None,
        Field(
            description='Of the training: steps, records, seed, ...; {"preset": "published"} for mend as in the paper.'
        ),
    ] = None,
) -> JobStarted:
    """Start training MEND or SERAC on the pristine model, which they need once. Returns a job id at once; minutes
    pass, and other work goes on. Next: get_job, then apply_edits with that method.

    Details:
    Returns a job id at once; the training takes minutes and asking and editing go on meanwhile. Data and
    parameters are checked first: a malformed record is refused with its file and line. The job is on the
    ledger with its seed, keeps checkpoints, and goes on by itself after a restart, a crash included. What
    it makes is kept for this very model and replaces what was trained before; earlier edits stay as they
    are. Next: get_job for curves and result, then apply_edits with that method.
    """
    return request.services.jobs.train_editor(method, data, params, ctx=request.ctx)


@toolset.tool("Compute statistics", takes_turn=False, scope="admin", changes=True, idempotent=True)
def compute_statistics(
    request: ToolRequest,
    layers: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Field(max_length=1000, description="Layers to compute second moments of; left out: all."),
    ] = None,
    tokens: Annotated[
        int | None,
        Field(
            ge=64, le=100_000_000, description="Tokens to use; left out: eight times the width of the MLP."
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        Field(
            max_length=4096,
            description="A text file in HOME/data, or a data set as owner/name; left out: shipped facts.",
        ),
    ] = None,
) -> JobStarted:
    """Compute the second moments that ROME and its kin need, beforehand, with more tokens or from your own corpus.
    They are made on first use otherwise. Returns a job id; next: get_job.

    Details:
    Closed-form methods make what they need by themselves on first use; this does it beforehand, for many
    layers in one pass, with more tokens, or from your own corpus. Returns a job id at once. The job's result has,
    per layer, the tokens used, the condition of the matrix and its effective rank. Moments that exist are kept,
    unless more tokens are asked for. Next: get_job.
    """
    return request.services.jobs.compute_statistics(layers, tokens, corpus, ctx=request.ctx)


@toolset.tool("Calibrate editing", takes_turn=False, scope="admin", changes=True)
def calibrate_editing(
    request: ToolRequest,
    methods: Annotated[
        list[Literal["rome", "memit", "alphaedit"]] | None,
        Field(max_length=3, description="Methods to calibrate; left out: all that work on this model."),
    ] = None,
    facts: Annotated[int, Field(ge=8, le=200, description="Facts to try edits of.")] = 16,
) -> JobStarted:
    """Find the layers and the strength of edits that fit this model, on shipped facts that it knows; takes minutes.
    Later edits use them if a call names none. Returns a job id; next: get_job.

    Details:
    Edits are tried on the pristine model at several layers and strengths and discarded. Success (said, reworded,
    neighbours and the subject's other facts kept) is weighed against the perplexity of ordinary text. Half of the
    facts choose; the figures of the profile are of the other half. The profile stands on the ledger and, as JSON,
    under HOME/profiles; method defaults, layer="auto" and method="auto" read it, and a report says so. Next: get_job,
    with plot=true for a picture.
    """
    return request.services.jobs.calibrate_editing(methods, facts, ctx=request.ctx)


@toolset.tool("Get a job", takes_turn=False)
async def get_job(
    request: ToolRequest,
    job_id: JobId,
    plot: Annotated[bool, Field(description="Also draw the curves of a training as a picture.")] = False,
    wait_seconds: WaitSeconds = 0,
) -> JobInfo:
    """How a job stands: state, progress, curves, time left, and its result when done. `next` says what to do. Find ids
    with list_jobs.

    Details:
    States: queued, running, done, failed (`message` says why), cancelled, interrupted (the server ended;
    it goes on by itself at the next start with the same model). `metrics` are the points of the curves,
    measured on validation facts that are not trained on. With plot=true they come as a picture too.
    Next: `next` says what.
    """
    jobs = request.services.jobs
    await jobs.wait(job_id, wait_seconds, request.ctx)
    job = await asyncio.to_thread(jobs.get, job_id)
    if plot and (picture := await asyncio.to_thread(jobs.curves, job)):
        request.show(picture)
    return job


@toolset.tool(
    "Cancel a job", takes_turn=False, scope="admin", changes=True, destructive=True, idempotent=True
)
def cancel_job(
    request: ToolRequest,
    job_id: JobId,
    action: Annotated[
        Literal["cancel", "pause", "resume"],
        Field(description="pause keeps what was done; a push begins again."),
    ] = "cancel",
) -> JobInfo:
    """End a job; nothing of it is kept. Or pause it, over restarts too, until it is resumed. One that has ended stays.

    Details:
    Its checkpoints are deleted.
    Returns when the running step is over, so that nothing of the job is left running. What was trained
    before stays in use. A job that has ended already is left as it is, without an error. Next: list_jobs,
    or train_editor again with other parameters.
    """
    jobs = request.services.jobs
    before = jobs.get(job_id).state
    after = {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.go_on}[action](job_id)
    if before in ENDED:
        told = f"{job_id} had ended before ({before}): there was nothing to {action}. list_jobs names those that run. "
        return after.model_copy(update={"next": told + after.next})
    return after


@toolset.tool("List jobs", takes_turn=False)
def list_jobs(
    request: ToolRequest,
    state: Annotated[
        Literal["queued", "running", "done", "failed", "cancelled", "interrupted"] | None,
        Field(description="Only jobs in this state."),
    ] = None,
    limit: Annotated[int, Field(ge=1, le=500, description="Most jobs in the answer.")] = 20,
) -> JobList:
    """Jobs of this home, newest first, running, waiting and ended. One runs at a time. Next: get_job for curves and
    result.
    """
    return request.services.jobs.list(state, limit)
