"""How a method that must be trained describes its training, so that a job can run any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from editors.model.lm import LM


class Monitor(Protocol):
    """The job's side of a running training: turns at the model, progress, curves."""

    folder: Path  # this job's own folder, for checkpoints
    model_hash: str

    def turn(self) -> AbstractContextManager[LM]:
        """The pristine model for one short step; others use it in between. May raise to end the training."""

    def report(self, fraction: float, message: str) -> None:
        """Say how far the training is (0..1). May raise to end the training."""

    def metric(self, values: Mapping[str, float]) -> None:
        """Add one point to the training curves."""


@dataclass(frozen=True)
class TrainingSpec:
    """The training of one method.

    params: the parameters of a training run; they have a `seed`.
    check(lm, params, data): raises InvalidEdit or NotReady for whatever can be known to be wrong before the
        training starts; returns the number of records in `data` (a path, or the name of the shipped data).
    run(data, params, monitor, folder): trains, writes the result into `folder`, and returns what to report.
        It goes on from a checkpoint in `monitor.folder` where there is one.
    published(lm): the paper's values of those parameters whose defaults differ; None where no such preset is known.
    folder: the parameter that may name a folder with another model's files, or a hub id; empty where there is none.
    """

    params: type[BaseModel]
    check: Callable[[LM, Any, str], int]
    run: Callable[[str, Any, Monitor, Path], Mapping[str, Any]]
    published: Callable[[LM], Mapping[str, Any]] | None = None
    folder: str = ""
