"""The progress of a correction, in a file of its job's folder that stays whole when the server is killed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "correction.json"


@dataclass
class CorrectionState:
    """What a resumed correction must know. Which facts are done is on the ledger."""

    version: int  # of the set
    batches: list[list[int]]
    retire: dict[str, list[str]]
    was_right: list[int]  # facts that were right before anything was changed
    answers: dict[str, str]  # what the model said then, by number
    perplexity: float  # on the canary texts, then
    rates: list[dict[str, Any]] = field(default_factory=list)  # of the batches that are kept
    applied: bool = False  # every batch has been tried

    @classmethod
    def load(cls, folder: Path) -> CorrectionState | None:
        """The last saved state; None if there is none."""
        path = folder / FILE
        return cls(**json.loads(path.read_text("utf-8"))) if path.exists() else None

    def save(self, folder: Path) -> None:
        """Save it in one step: the former file stays until the new one is on the disk."""
        scratch = folder / f".{FILE}"
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(folder / FILE)
