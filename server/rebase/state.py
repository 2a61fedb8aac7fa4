"""The progress of a rebase, in a file of its job's folder that stays whole when the server is killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.jobs.progress import SavedProgress

LINK = "rebased"
"""In the request of a new edit: `from`, the id of the old one, and `how`, "kept" or "anew"."""
OUTCOMES = ("right", "kept", "anew", "there", "left_out")
TO_DO = "to_do"


@dataclass
class RebaseState(SavedProgress):
    """What a resumed rebase must know. `outcomes`: by old id, with the new id and the reason where there are any."""

    FILE = "rebase.json"

    perplexity: float  # on the canary texts, before anything was carried
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # old ids of facts that were put to the model
    tried: list[int] = field(default_factory=list)  # old patches that were tried as they are
    weak: list[str] = field(
        default_factory=list
    )  # old ids that hold, in fewer wordings than on their own base
    rates: list[dict[str, Any]] = field(default_factory=list)  # of what was carried

    def of(self, *names: str) -> list[str]:
        """The old ids with one of these outcomes."""
        return [old for old, row in self.outcomes.items() if row["outcome"] in names]

    def note(self, old: str, outcome: str, edit: str | None = None, why: str | None = None) -> None:
        """Note an outcome; the old reason is kept where no new one is given."""
        before = self.outcomes.get(old, {})
        self.outcomes[old] = {"outcome": outcome, "edit": edit, "why": why or before.get("why")}
