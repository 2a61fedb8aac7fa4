"""One rebase: what its steps share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editors.edit import Edit
from server.facts.guard import Guard
from server.facts.measuring import edit_of
from server.facts.rates import mean_forms, mean_rate
from server.facts.results import EditOutcome
from server.jobs.job import Job
from server.rebase.old_base import OldBase
from server.rebase.requests import RebaseWishes
from server.rebase.state import LINK, TO_DO, RebaseState
from server.transaction.workspace import Workspace
from store import EditRecord


@dataclass(frozen=True)
class RebaseRun:
    """The job, the base that edits come from, and how they are carried over."""

    workspace: Workspace
    job: Job
    old: OldBase
    wishes: RebaseWishes
    state: RebaseState

    @property
    def reason(self) -> str:
        """Why its changes are made, as the ledger keeps it."""
        return f"carried over from {self.old.described}, {self.job.id}"

    def save(self) -> None:
        self.state.save(self.job.folder)

    def records(self, *outcomes: str) -> list[EditRecord]:
        """The old edits with one of these outcomes, oldest first."""
        return [self.old.facts[old] for old in self.state.of(*outcomes) if old in self.old.facts]

    def by_patch(self, *outcomes: str) -> dict[int, list[EditRecord]]:
        """The same by the old patch that they are part of, in ledger order."""
        groups: dict[int, list[EditRecord]] = {}
        for record in sorted(self.records(*outcomes), key=lambda r: (r.patch_id, r.row)):
            groups.setdefault(record.patch_id, []).append(record)
        return groups

    def guard(self, edits: int, watched: int) -> Guard:
        """The bounds of one transaction, those of a new edit."""
        guard = self.wishes.guard or Guard()
        return guard.standing(edits, watched) if self.workspace.settings.bounds == "standing" else guard

    def rated(self, results: Sequence[EditOutcome]) -> dict[str, Any]:
        """What the report's means are made of."""
        return {
            "edits": len(results),
            "forms": mean_forms(results),
            **{name: mean_rate(results, name) for name in ("subject_locality", "locality")},
        }

    def adopt(self) -> None:
        """Note what a killed run of this job had carried already."""
        to_do = set(self.state.of(TO_DO))
        for record in self.workspace.active_edits:
            link = record.request.get(LINK) or {}
            if record.request_id == self.job.id and link.get("from") in to_do:
                self.state.note(link["from"], link["how"], record.id)
        self.save()


def request_of(record: EditRecord) -> Edit:
    """The request of an old edit, with the reason and the source that it was made with."""
    return edit_of(record).model_copy(update={"reason": record.reason, "source": record.source})
