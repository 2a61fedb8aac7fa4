"""Training SERAC: a scope classifier on sentence embeddings, and a counterfactual adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from editors.learned.loop import Monitor
from editors.learned.records import Record


class SeracTraining(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = Field(0, ge=0, description="Of data order, wordings and initial weights.")


def check(params: SeracTraining) -> None: ...


class Trainer:
    def __init__(self, records: Sequence[Record], params: SeracTraining, monitor: Monitor) -> None: ...

    def run(self, target: Path) -> dict[str, Any]:
        return {}
