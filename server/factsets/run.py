"""One correction of a fact set: what its steps share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.factsets.fact import Fact
from server.factsets.requests import Policy
from server.jobs.job import Job
from server.transaction.workspace import Workspace
from store import FactState


@dataclass(frozen=True)
class CorrectionRun:
    """The job, its set and its policy."""

    workspace: Workspace
    job: Job
    name: str
    facts: dict[int, Fact]
    policy: Policy

    @property
    def reason(self) -> str:
        """Why its edits are made, as the ledger keeps it."""
        return f"fact set {self.name}, {self.job.id}"

    def states(self) -> dict[int, FactState]:
        """How the facts stand with the model."""
        return self.workspace.ledger.fact_states(self.name, self.workspace.writable_model_id)

    def outcomes(self) -> dict[int, FactState]:
        """The facts that this job has an outcome for."""
        return {n: s for n, s in self.states().items() if s.job_id == self.job.id and n in self.facts}

    def note(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Record outcomes of this job."""
        mine = {n: {**values, "job_id": self.job.id} for n, values in rows.items()}
        self.workspace.ledger.put_fact_states(self.name, self.workspace.writable_model_id, mine)
