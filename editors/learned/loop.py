"""What every training here shares: its line to the job that runs it, and checkpoints without pickle."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from editors.errors import EditError
from editors.model.lm import LM


class Monitor(Protocol):
    """What a training is given to work with."""

    folder: Path  # of this job alone; checkpoints lie here
    model_hash: str

    def turn(self) -> AbstractContextManager[LM]:
        """The pristine model for one short step; others get it in between. May raise to end the training."""

    def report(self, fraction: float, message: str) -> None:
        """How far it has come. May raise to end the training."""

    def metric(self, values: Mapping[str, float]) -> None:
        """One point of the curves."""


def save_state(
    path: Path, tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, notes: Mapping[str, Any]
) -> None:
    """Write a checkpoint in one step: parameters, the optimiser's moments, and JSON notes."""
    parts = {f"p/{k}": v for k, v in tensors.items()}
    for i, values in optimiser.state_dict()["state"].items():
        parts |= {f"o/{i}/{k}": v for k, v in values.items()}
    parts = {k: v.detach().cpu().contiguous() for k, v in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(safetensors.torch.save(parts, metadata={"notes": json.dumps(dict(notes))}))
    temporary.replace(path)


def load_state(
    path: Path, optimiser: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote, into the optimiser too. Raises EditError for a damaged file."""
    try:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        parts = safetensors.torch.load(data)
        notes: dict[str, Any] = json.loads(header["notes"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise EditError(f"the checkpoint {path} is damaged ({error}); start the training anew") from error
    if optimiser is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in parts.items():
            if key.startswith("o/"):
                _, i, name = key.split("/", 2)
                state.setdefault(int(i), {})[name] = value
        optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return {k[2:]: v for k, v in parts.items() if k.startswith("p/")}, notes


def peak_memory_mb() -> int:
    """Most memory the process (or the GPU, where one is used) has taken so far, in MB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
