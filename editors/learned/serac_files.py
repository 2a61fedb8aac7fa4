"""A trained SERAC on disk: judge and adapter, under the digest that memories name them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from editors.errors import EditError
from editors.learned.counterfactual import Adapter, Site
from editors.learned.scope import Encoder, Judge, encoder

FILE = "serac.safetensors"  # what was trained last
FORMAT = "errata-serac-1"


@dataclass(frozen=True)
class Trained:
    """Judge and adapter of one training run, and the encoder they belong to."""

    judge: Judge
    adapter: Adapter
    encoder_name: str
    threshold: float
    notes: Mapping[str, Any]

    @property
    def encoder(self) -> Encoder:
        return encoder(self.encoder_name)

    def save(self, folder: Path, model_hash: str) -> Path:
        """Write under its own digest, for the memories that will use it, and as the present one."""
        parts = {f"judge/{k}": v for k, v in self.judge.state_dict().items()}
        parts |= {f"adapter/{k}": v for k, v in self.adapter.state_dict().items()}
        header = {
            "format": FORMAT,
            "model": model_hash,
            "encoder": self.encoder_name,
            "threshold": repr(self.threshold),
            "width": str(self.judge.width),
            "rank": str(self.adapter.rank),
            "sites": json.dumps([vars(s) for s in self.adapter.sites]),
            "notes": json.dumps(dict(self.notes), sort_keys=True),
        }
        data = safetensors.torch.save(
            {k: v.detach().cpu().contiguous() for k, v in parts.items()}, metadata=header
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (kept_as(hashlib.sha256(data).hexdigest()), FILE):
            temporary = folder / f"{name}.tmp"
            temporary.write_bytes(data)
            temporary.replace(folder / name)
        return folder / FILE


def kept_as(digest: str) -> str:
    """File name of the training with this digest."""
    return f"serac-{digest[:16]}.safetensors"


@lru_cache(maxsize=4)
def load_trained(path: Path, modified: int) -> Trained:
    """A trained SERAC, read once for all memories that use it. Raises EditError for a file that is none."""
    try:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        parts = safetensors.torch.load(data)
        with torch.random.fork_rng(devices=[]):  # fresh layers draw their weights
            judge = Judge(int(header["width"]))
        adapter = Adapter([Site(**s) for s in json.loads(header["sites"])], int(header["rank"]))
        for module, name in ((judge, "judge/"), (adapter, "adapter/")):
            module.load_state_dict({k.removeprefix(name): v for k, v in parts.items() if k.startswith(name)})
        threshold, notes = float(header["threshold"]), json.loads(header["notes"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise EditError(f"{path} is not a trained SERAC ({error}); train_editor makes it anew") from error
    judge.eval().requires_grad_(False)
    return Trained(judge, adapter.requires_grad_(False), header["encoder"], threshold, notes)
