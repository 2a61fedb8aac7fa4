"""A trained SERAC on disk: judge and adapter, in a file named after its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from editors.bounded_files import read_regular
from editors.errors import EditError
from editors.files import read_tensors, tensor_bytes, write_atomically
from editors.learned.checkpoints import part_of
from editors.learned.counterfactual import AdaptedWeight, CounterfactualAdapter
from editors.learned.scope import Encoder, Judge, load_encoder

FILE = "serac.safetensors"  # the latest training
FORMAT = "errata-serac-1"


@dataclass(frozen=True)
class TrainedSerac:
    """Judge and adapter of one training run, and the sentence encoder they were trained with."""

    judge: Judge
    adapter: CounterfactualAdapter
    encoder_name: str
    threshold: float
    notes: Mapping[str, Any]

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder. Raises NotReady when it is not installed."""
        return load_encoder(self.encoder_name)

    def save(self, folder: Path, model_hash: str) -> Path:
        """Write the networks twice: under their digest, for the patches that use them, and as the latest training."""
        parts = {f"judge/{k}": v for k, v in self.judge.state_dict().items()}
        parts |= {f"adapter/{k}": v for k, v in self.adapter.state_dict().items()}
        metadata = {
            "format": FORMAT,
            "model": model_hash,
            "encoder": self.encoder_name,
            "threshold": repr(self.threshold),
            "width": str(self.judge.width),
            "rank": str(self.adapter.rank),
            "sites": json.dumps([vars(s) for s in self.adapter.sites]),
            "notes": json.dumps(dict(self.notes), sort_keys=True),
        }
        data = tensor_bytes(parts, metadata)
        for name in (file_name_of(hashlib.sha256(data).hexdigest()), FILE):
            write_atomically(folder / name, data)
        return folder / FILE


def file_name_of(digest: str) -> str:
    """Name of the file whose bytes have this SHA-256 digest."""
    return f"serac-{digest[:16]}.safetensors"


@lru_cache(maxsize=4)
def load_trained(path: Path, modified: int) -> TrainedSerac:
    """Read a trained SERAC, once for all patches that use it.

    Args:
        modified: the file's time of modification, so that a newer file is read again.

    Raises EditError when the file is not a trained SERAC, or not the one that its name says.
    """
    try:
        data = read_regular(path)
        if path.name not in (FILE, file_name_of(hashlib.sha256(data).hexdigest())):
            raise ValueError("it was changed: its bytes are not those that its name says")
        tensors, metadata = read_tensors(data)
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        with torch.random.fork_rng(devices=[]):  # new layers draw random weights
            judge = Judge(int(metadata["width"]))
        adapter = CounterfactualAdapter(
            [AdaptedWeight(**s) for s in json.loads(metadata["sites"])], int(metadata["rank"])
        )
        judge.load_state_dict(part_of(tensors, "judge/"))
        adapter.load_state_dict(part_of(tensors, "adapter/"))
        threshold, notes = float(metadata["threshold"]), json.loads(metadata["notes"])
        encoder_name = metadata["encoder"]
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise EditError(f"{path} is not a trained SERAC ({error}); run train_editor again") from error
    judge.eval().requires_grad_(False)
    return TrainedSerac(judge, adapter.requires_grad_(False), encoder_name, threshold, notes)
