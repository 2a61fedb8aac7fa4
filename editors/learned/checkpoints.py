"""Checkpoints of a training: parameters, the optimiser's moments and the progress, in one safetensors file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from editors.errors import EditError
from editors.files import read_tensors, tensor_bytes, write_atomically

NAME = "checkpoint.safetensors"


class TrainingProgress(BaseModel):
    """How far a training is. The aliases are the names in the file."""

    model_config = ConfigDict(populate_by_name=True, extra="ignore")

    step: int = 0
    best_score: float | None = Field(None, alias="best")
    without_better: int = Field(0, alias="since", description="Validations since the best one.")
    best: dict[str, Any] | None = Field(None, alias="kept", description="Rates of the best validation.")
    untrained: dict[str, Any] = Field({}, alias="before", description="Rates before the first step.")
    cpu_seconds: float = Field(0.0, alias="cpu")

    def improves(self, score: float, rates: Mapping[str, float]) -> bool:
        """Note a validation; True when its score is the best so far."""
        if self.best_score is not None and score <= self.best_score:
            self.without_better += 1
            return False
        self.best_score, self.without_better = score, 0
        self.best = {**rates, "step": self.step}
        return True


class CpuClock:
    """CPU seconds of a training, including its earlier runs."""

    def __init__(self, earlier: float) -> None:
        self._earlier, self._start = earlier, time.process_time()

    def seconds(self) -> float:
        return self._earlier + time.process_time() - self._start


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, progress: TrainingProgress
) -> None:
    """Write a checkpoint in one step: a reader sees the old file or the new one, never half of one."""
    parts = {f"p/{k}": v for k, v in tensors.items()}
    for i, values in optimiser.state_dict()["state"].items():
        parts |= {f"o/{i}/{k}": v for k, v in values.items()}
    notes = json.dumps(progress.model_dump(by_alias=True))
    write_atomically(path, tensor_bytes(parts, {"notes": notes}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters and moments, and the progress as JSON, of a file that `save_checkpoint` wrote.

    Raises EditError for a damaged file.
    """
    try:
        tensors, metadata = read_tensors(path.read_bytes())
        notes: dict[str, Any] = json.loads(metadata["notes"])
    except (OSError, KeyError, ValueError) as error:
        raise EditError(f"the checkpoint {path} is damaged ({error}); start the training anew") from error
    return tensors, notes


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's moments into the optimiser."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part_of(tensors, "o/").items():
        i, name = key.split("/", 1)
        state.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
