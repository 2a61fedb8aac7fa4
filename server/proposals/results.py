"""Results of the tools of proposals."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.facts.results import EditReport
from server.results import Quoting, Result

ProposalState = Literal["waiting", "approved", "declined", "changes", "rejected"]


class ProposalReport(Quoting):
    """The state of a proposal."""

    proposal_id: str = Field(description='Its id, such as "p1"; empty where nothing was proposed.')
    state: ProposalState = Field(
        description="waiting; approved; declined; changes: wanted, see `note`; rejected: its bounds did not hold."
    )
    message: str
    note: str | None = Field(None, description="The note given with the decision.")
    edit_ids: list[str] = Field(default=[], description="The edits it became.")
    report: EditReport | None = Field(None, description="What was measured.")
    next: str


class ProposalRow(Result):
    proposal_id: str
    state: ProposalState
    facts: list[str] = Field(description="Prompt and right answer of the first ones.")
    edits: int
    reason: str | None
    client: str | None
    identity: str | None
    created: str
    decided: str | None
    decided_by: str | None = Field(None, description="And whether that is who proposed it.")
    note: str | None
    edit_ids: list[str]


class ProposalList(Result):
    proposals: list[ProposalRow]
    waiting: int
