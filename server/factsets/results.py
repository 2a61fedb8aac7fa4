"""What the tools of fact sets answer: counts first, lists short and in pages."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from server.results import UNTRUSTED, Quoting, Result


class SavedFacts(Result):
    name: str
    version: int
    facts: int
    summary: str = Field(description="Counts first: what is in the set, and what changed.")
    read_as: dict[str, Any] = Field(default={}, description="Which column or format became what.")
    examples: list[str] = Field(default=[], description="The first facts, as they were read.")
    changed: list[str] = Field(default=[], description="Facts whose answer changed, at most 10.")
    conflicts: list[str] = Field(
        default=[],
        description="Facts that contradict each other, at most 10; they are saved but not corrected.",
    )
    left_out: list[str] = Field(default=[], description="Records that are no facts, and why; at most 10.")
    unused: list[str] = Field(default=[], description="Columns and fields that were not used.")
    next: str


class FactSetRow(Result):
    name: str
    version: int
    facts: int
    changed: str
    state: dict[str, int] = Field(description="Facts by verdict of the last check with this model.")


class FactSetList(Result):
    sets: list[FactSetRow]


class FactSetPage(Quoting):
    """A page of a set. A fact has n, prompt and right, and what is known: verdict, says, outcome, why, edit ..."""

    name: str
    version: int
    total: int = Field(description="Facts that match.")
    facts: list[dict[str, Any]] = Field(json_schema_extra=UNTRUSTED)
    next_cursor: str | None = None
    detail: dict[str, Any] | None = Field(None, description="One fact in full, with number=.")


class ExportedFacts(Result):
    path: str
    facts: int
    bytes: int
    sha256: str
