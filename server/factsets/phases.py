"""The progress of a correction, in a file of its job's folder that stays whole when the server is killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.jobs.progress import SavedProgress


@dataclass
class CorrectionState(SavedProgress):
    """What a resumed correction must know. Which facts are done is on the ledger."""

    FILE = "correction.json"

    version: int  # of the set
    batches: list[list[int]]
    retire: dict[str, list[str]]
    was_right: list[int]  # facts that were right before anything was changed
    answers: dict[str, str]  # what the model said then, by number
    perplexity: float  # on the canary texts, then
    rates: list[dict[str, Any]] = field(default_factory=list)  # of the batches that are kept
    applied: bool = False  # every batch has been tried
