"""The job that pushes the active edits to an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from editors.model.lm import LM
from server.engines.engine import Engine
from server.engines.kinds import engine_of
from server.engines.preparing import fitting
from server.engines.pushing import push
from server.engines.settings import EngineSettings, read_engines
from server.errors import ServiceError
from server.transaction.workspace import Workspace
from store import Who

if TYPE_CHECKING:
    from server.jobs.job import Job

KIND = "push_edits"


def engines_of(workspace: Workspace) -> dict[str, EngineSettings]:
    """The engines named at start. Raises ServiceError when their file cannot be used."""
    try:
        return read_engines(workspace.settings.engines)
    except ValueError as error:
        raise ServiceError(f"--engines: {error}") from None


def engine_named(workspace: Workspace, name: str) -> Engine:
    """An engine that was named at start. Raises ServiceError with those there are."""
    engines = engines_of(workspace)
    if name not in engines:
        there = (
            f"the names are {', '.join(engines)}"
            if engines
            else "the server was started without --engines FILE, where whoever runs it names them"
        )
        raise ServiceError(f"no engine has the name {name[:80]!r}; {there}")

    @contextmanager
    def pristine() -> Iterator[LM]:
        with workspace.turn(bounded=False), workspace.host.pristine():
            yield workspace.lm

    return engine_of(engines[name], pristine)


def check(workspace: Workspace, engine: str, leave_out: bool) -> dict[str, Any]:
    """The job's request. Raises ServiceError for an engine that does not exist and for edits that cannot be pushed."""
    engine_named(workspace, engine)
    fitting(workspace, leave_out)
    return {"engine": engine, "leave_out": leave_out}


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Push and prove. Raises ServiceError, with all that was found as the job's result, when it did not land."""
    engine = engine_named(workspace, job.request["engine"])
    who = Who(identity=job.request.get("identity"), client=job.request.get("asked_by"))
    result = push(workspace, engine, job.request["leave_out"], who, job.check, job.report)
    found: Mapping[str, Any] = result.model_dump(mode="json")
    if result.problem:
        workspace.ledger.update_job(job.id, result=found)
        back = "its former state is back" if result.restored else "whoever runs it must look at it"
        raise ServiceError(f"{engine.settings.name} was not given the edits: {result.problem} ({back})")
    return found
