"""The job that trains an editor (see the methods' own `training`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from editors.errors import InvalidEdit
from editors.learned.record_files import SHIPPED
from editors.table import METHODS
from editors.training_spec import TrainingSpec
from server.jobs.runner import Job
from server.methods import with_preset
from server.named_files import named_path
from server.transaction.replay import trained_folder
from server.transaction.workspace import Workspace

KIND = "train_editor"
MAX_DATA = 2**30  # bytes of all files that a training reads


def check(workspace: Workspace, method: str, data: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The job's request. Raises InvalidEdit, ServiceError or NotReady for everything that can be wrong with it."""
    spec = spec_of(method)
    published = None if spec.published is None else spec.published(workspace.lm)
    values = _checked(spec.params, with_preset(f"the training of {method}", published, params))
    where = _found(workspace, data)
    count = spec.check(workspace.lm, values, where)
    return {"method": method, "data": where, "params": values.model_dump(mode="json"), "records": count}


def _found(workspace: Workspace, data: str) -> str:
    """The shipped set, or the real path of a file or folder that may be read. Raises ServiceError."""
    return data if data == SHIPPED else str(named_path(workspace.settings, "data", data, MAX_DATA))


def spec_of(method: str) -> TrainingSpec:
    """How the method is trained. Raises InvalidEdit for a method that needs no training."""
    trainable = {editor.name: editor.training for editor in METHODS.values() if editor.training is not None}
    if method not in trainable:
        raise InvalidEdit(f"method {method!r} is not trained; train_editor trains {', '.join(trainable)}")
    return trainable[method]


def _checked(model: type[BaseModel], params: Mapping[str, Any]) -> BaseModel:
    try:
        return model.model_validate(params)
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
    spec = spec_of(job.request["method"])
    params = spec.params.model_validate(job.request["params"])
    folder = trained_folder(workspace.settings.home, workspace.base_hash)
    return spec.run(_found(workspace, job.request["data"]), params, job, folder)
