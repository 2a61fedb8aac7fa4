"""The job that trains an editor (see the methods' own `training`)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from editors.bounded_files import digest_of_file
from editors.errors import InvalidEdit
from editors.files import write_atomically
from editors.learned.record_files import SHIPPED
from editors.table import METHODS
from editors.training_spec import TrainingSpec
from server.errors import ServiceError
from server.factsets.fact import Fact
from server.factsets.reading import TABLES, read_file
from server.jobs.job import Job
from server.methods import with_preset
from server.named_files import named_folder, named_path
from server.transaction.replay import trained_folder
from server.transaction.workspace import Workspace
from store.made_files import UNKNOWN

KIND = "train_editor"
CONVERTED = re.compile(r"[0-9a-f]{16}\.jsonl")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
MAX_DATA = 2**30  # bytes of all files that a training reads


def check(workspace: Workspace, method: str, data: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The job's request. Raises InvalidEdit, ServiceError or NotReady for any mistake in it."""
    spec = spec_of(method)
    published = None if spec.published is None else spec.published(workspace.lm)
    values = _checked(spec.params, with_preset(f"the training of {method}", published, params))
    values = _with_real_folder(workspace, spec, values)
    where = _found(workspace, data)
    try:
        count = spec.check(workspace.lm, values, where)
    except InvalidEdit as error:
        where = _records_of_facts(workspace, data, error)
        count = spec.check(workspace.lm, values, where)
    return {"method": method, "data": where, "params": values.model_dump(mode="json"), "records": count}


def _found(workspace: Workspace, data: str) -> str:
    """The shipped set, or the real path of a file or folder that may be read. Raises ServiceError."""
    if data == SHIPPED or _is_converted(workspace, Path(data)):
        return data
    return str(named_path(workspace.settings, "data", data, MAX_DATA))


def _with_real_folder(workspace: Workspace, spec: TrainingSpec, values: BaseModel) -> BaseModel:
    """The parameters with the real path of the folder that one of them names; left out, or a hub id, it stays as it is.

    Raises ServiceError for a folder that is not read from.
    """
    if not spec.folder or spec.folder not in values.model_fields_set:
        return values
    given = getattr(values, spec.folder)
    if given == type(values).model_fields[spec.folder].default:
        return values
    try:
        real = named_folder(workspace.settings, f"params.{spec.folder}", given, MAX_DATA)
    except ServiceError:
        if HUB_ID.fullmatch(given) and not Path(given).exists():
            return values
        raise
    return values.model_copy(update={spec.folder: str(real)})


def _is_converted(workspace: Workspace, path: Path) -> bool:
    """Whether a path is one that `_records_of_facts` gave."""
    own = path.parent == _converted(workspace) and CONVERTED.fullmatch(path.name)
    return bool(own) and not path.is_symlink()


def _converted(workspace: Workspace) -> Path:
    return workspace.settings.home / "trained" / "data"


def _records_of_facts(workspace: Workspace, data: str, refused: InvalidEdit) -> str:
    """A file of records for a table or data set that save_facts reads, written once by its content.

    Raises the error of the training itself or, for a table, the error of reading it.
    """
    try:
        reading = read_file(workspace.settings, data)
    except ServiceError:
        if Path(data.removesuffix(".gz")).suffix.lower() in TABLES:
            raise
        raise refused from None
    lines = "".join(f"{json.dumps(_record(fact), ensure_ascii=False)}\n" for _, fact in reading.facts)
    if not lines:
        raise refused
    path = _converted(workspace) / f"{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():  # a running job may read it
        write_atomically(path, lines.encode())
    return str(path)


def _record(fact: Fact) -> dict[str, Any]:
    """A fact in the form of an edit, with its data set's prompts about other things as neighbours."""
    stay = [probe.prompts[0] for probe in fact.probes if not probe.follows]
    return {
        "subject": fact.subject,
        "prompt": fact.text,
        "target": fact.answer,
        "paraphrases": list(fact.paraphrases),
        "neighbours": [{"prompt": prompt} for prompt in stay],
    }


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
    params = _with_real_folder(workspace, spec, spec.params.model_validate(job.request["params"]))
    folder = trained_folder(workspace.settings.home, workspace.base_hash)
    made = f"{job.request['method']}*.safetensors"
    workspace.made.note(
        dict.fromkeys(folder.glob(made), UNKNOWN)
    )  # a crash leaves no file that looks changed
    result = spec.run(_found(workspace, job.request["data"]), params, job, folder)
    workspace.made.note({path: digest_of_file(path) for path in folder.glob(made)})
    return result
