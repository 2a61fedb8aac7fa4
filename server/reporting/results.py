"""The result of the tool `report`."""

from __future__ import annotations

from pydantic import Field

from server.results import UNTRUSTED, Quoting


class ReportFile(Quoting):
    """A report that was written."""

    path: str = Field(description="The file, under HOME/exports.")
    text: str = Field("", description="Short Markdown is repeated here.", json_schema_extra=UNTRUSTED)
    bytes: int
    sha256: str
    summary: str
    corrections: int
    active: int
    taken_back: int
    not_holding: int
    facts_moved: int
    perplexity_ratio: float | None = Field(description="At the end of the period, over the original model's.")
    problems: list[str] = Field(description="What is wrong with the ledger; empty when it is whole.")
