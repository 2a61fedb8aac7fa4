"""The job that trains an editor (see the methods' own `training`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from editors.errors import InvalidEdit
from editors.learned import mend_training, records, serac_training
from editors.learned.mend import FILE as MEND_FILE
from server.jobs.runner import Job
from server.transaction.replay import trained_folder
from server.transaction.workspace import Workspace

KIND = "train_editor"

PARAMS: dict[str, type[BaseModel]] = {
    "mend": mend_training.MendTraining,
    "serac": serac_training.SeracTraining,
}


def check(workspace: Workspace, method: str, data: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The job's request. Raises InvalidEdit or NotReady for everything that can be wrong with it."""
    chosen = _checked(method, params)
    found = records.read(data, chosen.model_dump()["seed"])
    if isinstance(chosen, mend_training.MendTraining):
        mend_training.target_weights(workspace.lm, chosen.layers)
    elif isinstance(chosen, serac_training.SeracTraining):
        serac_training.check(chosen)
    where = data if data == records.SHIPPED else str(Path(data).expanduser().absolute())
    return {
        "method": method,
        "data": where,
        "params": chosen.model_dump(mode="json"),
        "records": len(found),
    }


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


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Train, from the job's checkpoint where there is one; returns what the job reports as its result."""
    method = job.request["method"]
    found = records.read(job.request["data"], job.request["params"]["seed"])
    folder = trained_folder(workspace.settings.home, workspace.host.base_hash)
    if method == "mend":
        mend = mend_training.Trainer(found, mend_training.MendTraining(**job.request["params"]), job)
        return mend.run(folder / MEND_FILE)
    serac = serac_training.Trainer(found, serac_training.SeracTraining(**job.request["params"]), job)
    return serac.run(folder)
