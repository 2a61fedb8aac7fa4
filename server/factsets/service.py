"""The service of fact sets: save, list, show and export them; check them and put them right as jobs."""

from __future__ import annotations

from collections import Counter

from server.factsets import saving
from server.factsets.requests import Given, Kind
from server.factsets.results import ExportedFacts, FactSetList, FactSetPage, FactSetRow, SavedFacts
from server.factsets.saving import states_of
from server.request_context import RequestContext
from server.transaction.workspace import Workspace


class FactSetService:
    """Lists of right answers. No call waits for the model; what needs it is a job."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def save(self, name: str, given: Given, ctx: RequestContext | None = None) -> SavedFacts:
        """Save facts as the next version of a set. Raises ServiceError."""
        return saving.save(self._workspace, name, given, ctx or RequestContext())

    def list(self) -> FactSetList:
        """Every set, with counts of the last check with this model."""
        rows = []
        for record in self._workspace.ledger.fact_sets():
            states = states_of(self._workspace, record.name)
            counts = Counter(state.verdict for state in states.values() if state.verdict)
            rows.append(
                FactSetRow(
                    name=record.name,
                    version=record.version,
                    facts=record.facts,
                    changed=record.changed,
                    state=dict(sorted(counts.items())),
                )
            )
        return FactSetList(sets=rows)

    def show(
        self,
        name: str,
        kind: Kind | None = None,
        number: int | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> FactSetPage:
        """A page of a set, or one fact in full. Raises NoSuchSet or ServiceError."""
        return saving.page(self._workspace, name, kind, number, limit, cursor)

    def export(self, name: str, file_name: str | None = None) -> ExportedFacts:
        """Write a set as CSV into HOME/exports. Raises NoSuchSet or ServiceError."""
        return saving.export(self._workspace, name, file_name)
