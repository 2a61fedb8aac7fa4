"""The jobs there are: training an editor, computing second moments. What the tools of `train` call."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from editors.errors import EditError, InvalidEdit
from editors.learned import mend_training, records, serac_training
from editors.learned.loop import peak_memory_mb
from editors.learned.mend import FILE as MEND_FILE
from editors.model.lm import LM
from editors.moments import Statistics, condition_of, sample_name
from server.errors import ServiceError
from server.jobs.results import JobInfo, JobList, JobRow, JobStarted
from server.jobs.runner import Job, JobRunner
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from store import JobRecord

Method = Literal["mend", "serac"]
RIDGE = 0.01  # as ROME adds it
DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name, with a configuration


PARAMS: dict[str, type[BaseModel]] = {
    "mend": mend_training.MendTraining,
    "serac": serac_training.SeracTraining,
}


def trained_folder(home: Path, base_hash: str) -> Path:
    """Where the trained editors of one model lie."""
    return home / "trained" / base_hash[:16]


# --- starting ------------------------------------------------------------------------------------


def train_editor(
    workspace: Workspace, method: Method, data: str, params: Mapping[str, Any] | None, ctx: RequestContext
) -> JobStarted:
    """Check everything that can be wrong, then start the job. Raises InvalidEdit, NotReady or ReadOnly."""
    runner = _runner(workspace)
    chosen = _checked(method, params)
    found = records.read(data, chosen.model_dump()["seed"])
    if isinstance(chosen, mend_training.MendTraining):
        mend_training.target_weights(workspace.lm, chosen.layers)
    elif isinstance(chosen, serac_training.SeracTraining):
        serac_training.check(chosen)
    where = data if data == records.SHIPPED else str(Path(data).expanduser().absolute())
    request = {
        "method": method,
        "data": where,
        "params": chosen.model_dump(mode="json"),
        "records": len(found),
    }
    return _started(runner.submit("train_editor", request, ctx.client))


def _checked(method: str, params: Mapping[str, Any] | None) -> BaseModel:
    model = PARAMS[method]
    try:
        return model.model_validate(dict(params or {}))
    except ValidationError as error:
        raise InvalidEdit("; ".join(_explain(model, e) for e in error.errors())) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    name = ".".join(map(str, problem["loc"])) or "params"
    if problem["type"] == "extra_forbidden":
        return f"params.{name} is not a parameter of this training; it has {', '.join(model.model_fields)}"
    return (
        f"params.{name}: {problem['msg'].removeprefix('Value error, ')}, not {str(problem['input'])[:80]!r}"
    )


def compute_statistics(
    workspace: Workspace,
    layers: Sequence[int] | None,
    tokens: int | None,
    corpus: str | None,
    ctx: RequestContext,
) -> JobStarted:
    """Start computing second moments. Raises InvalidEdit for a layer or file that is not there."""
    runner = _runner(workspace)
    wanted = sorted(set(range(workspace.lm.n_layers) if layers is None else layers))
    if not wanted:
        raise InvalidEdit("layers is empty; name at least one, or leave it out for all")
    for layer in wanted:
        workspace.lm.mlp_out(layer)
    if workspace.lm.is_seq2seq:
        raise InvalidEdit(
            "second moments are for decoder-only models; this one needs none for mend, serac, ft or lora"
        )
    path: Path | str | None = None if corpus is None else Path(corpus).expanduser().absolute()
    if corpus is not None and isinstance(path, Path) and not path.exists() and DATASET.fullmatch(corpus):
        path = corpus
    if isinstance(path, Path) and not path.is_file():
        raise InvalidEdit(
            f"corpus {corpus!r} is not a file; give a UTF-8 text file, a data set as owner/name, or leave it out to "
            "sample text from the model"
        )
    request = {"layers": wanted, "tokens": tokens, "corpus": None if path is None else str(path)}
    return _started(runner.submit("compute_statistics", request, ctx.client))


def _runner(workspace: Workspace) -> JobRunner:
    _ = workspace.writable_model_id
    if workspace.jobs is None:
        raise ServiceError("this server runs no jobs; start it without --read-only")
    return workspace.jobs


def _started(record: JobRecord) -> JobStarted:
    return JobStarted(
        job_id=record.id,
        state=record.state,
        kind=record.kind,
        message=record.message,
        next=f'get_job("{record.id}") shows how far it is; asking and editing go on meanwhile.',
    )


# --- looking -------------------------------------------------------------------------------------


def get_job(workspace: Workspace, job_id: str) -> JobInfo:
    """One job. Raises NoSuchJob."""
    record = workspace.ledger.get_job(job_id)
    return JobInfo(
        **_row(record).model_dump(),
        request=record.request,
        metrics=record.metrics,
        eta_seconds=record.eta_seconds if record.state == "running" else None,
        result=record.result,
        next=_next(record, workspace),
    )


def list_jobs(workspace: Workspace, state: str | None, limit: int) -> JobList:
    """Jobs, newest first."""
    return JobList(jobs=[_row(r) for r in workspace.ledger.list_jobs(state, limit)])


def cancel_job(workspace: Workspace, job_id: str) -> JobInfo:
    """End a job and wait until its step is over."""
    runner = _runner(workspace)
    runner.cancel(job_id)
    runner.settled(job_id, 30.0)
    return get_job(workspace, job_id)


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


def _next(record: JobRecord, workspace: Workspace) -> str:
    if record.state in ("queued", "running"):
        return "Call get_job again later; cancel_job ends it."
    if record.state == "interrupted":
        if record.request.get("model_hash") != workspace.host.base_hash:
            return f"It goes on when the server is started with {record.request.get('model')} again."
        return "It goes on by itself when the server is started again."
    if record.state == "done" and record.kind == "train_editor":
        return f'apply_edits with method="{record.request["method"]}" uses what was trained.'
    if record.state == "failed":
        return "Correct what the message says and start it anew."
    return ""


# --- the work ------------------------------------------------------------------------------------


def _train(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    method = job.request["method"]
    found = records.read(job.request["data"], job.request["params"]["seed"])
    folder = trained_folder(workspace.settings.home, workspace.host.base_hash)
    if method == "mend":
        mend = mend_training.Trainer(found, mend_training.MendTraining(**job.request["params"]), job)
        return mend.run(folder / MEND_FILE)
    serac = serac_training.Trainer(found, serac_training.SeracTraining(**job.request["params"]), job)
    return serac.run(folder)


class _Turns:
    """The pristine model, let go for a moment at every report of a long computation."""

    def __init__(self, job: Job) -> None:
        self._job, self._stack = job, ExitStack()

    def __enter__(self) -> LM:
        return self._stack.enter_context(self._job.turn())

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def report(self, fraction: float, message: str) -> None:
        self._stack.close()
        self._job.report(0.9 * fraction, message)
        turn: AbstractContextManager[LM] = self._job.turn()
        self._stack.enter_context(turn)


def _statistics(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    layers, tokens = job.request["layers"], job.request["tokens"]
    corpus: Path | str | None = job.request["corpus"]
    if corpus is not None and Path(corpus).is_absolute():
        corpus = Path(corpus)
    sample = sample_name(corpus)
    made = Statistics(workspace.statistics.folder, workspace.host.base_hash, tokens or 0, workspace.lm.device)
    few = [
        i
        for i in layers
        if tokens and i not in made.missing([i], sample) and _tokens(made, i, sample) < tokens
    ]
    with workspace.host.lock:
        workspace.statistics.forget(few, sample)
    made.forget(few, sample)
    turns = _Turns(job)
    with turns as lm:
        made.ensure(lm, layers, turns.report, corpus)
    reports = []
    for n, layer in enumerate(layers):
        job.report(0.9 + 0.1 * n / len(layers), f"condition of layer {layer}")
        reports.append(_report(made, layer, sample))
    return {"sample": sample, "layers": reports, "peak_memory_mb": peak_memory_mb()}


def _tokens(statistics: Statistics, layer: int, sample: str) -> int:
    try:
        return statistics.get(layer, sample).tokens
    except EditError:
        return 0


def _report(statistics: Statistics, layer: int, sample: str) -> dict[str, Any]:
    """How well a layer's second moment can be inverted; `condition` is None where it is singular."""
    moment = statistics.get(layer, sample)
    found = condition_of(moment, RIDGE, statistics.device)
    return {
        "layer": layer,
        "tokens": moment.tokens,
        "width": len(moment.matrix),
        "tokens_per_width": round(found.tokens_per_input, 2),
        "condition": found.condition if math.isfinite(found.condition) else None,
        "condition_with_ridge": found.regularised,
        "effective_rank": round(found.effective_rank, 1),
    }


WORK = {"train_editor": _train, "compute_statistics": _statistics}
