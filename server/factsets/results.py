"""Results of the tools of fact sets: counts first, lists short and in pages. Imports nothing heavy."""

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
    left_out: list[str] = Field(default=[], description="Records that cannot be facts, and why; at most 10.")
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


class SetCheck(Result):
    """The verdicts of a fact set for the model."""

    name: str
    version: int
    job_id: str
    state: str = Field(description="done, or how far the job is.")
    summary: str = Field(description="Counts first.")
    counts: dict[str, int] = Field(
        default={}, description="Facts by verdict; changed: since the check before."
    )
    facts: list[dict[str, Any]] = Field(
        default=[],
        json_schema_extra=UNTRUSTED,
        description="Facts that changed, differ or are unsure, at most `limit`; show_fact_set has the rest.",
    )
    meanings: dict[str, str] = Field(default={}, description="What each verdict means.")
    next: str


class Correction(Quoting):
    """What a correction of a set did, or would do."""

    job_id: str
    status: str = Field(description="planned, corrected, running, failed ...")
    set: str = ""
    version: int | None = None
    summary: str = Field("", description="Counts first.")
    outcomes: dict[str, dict[str, Any]] = Field(
        default={},
        description="done, right (nothing to do), failed, skipped, lost (was right and is not now), planned: how many, "
        "and their numbers as ranges.",
    )
    planned: list[str] = Field(default=[], json_schema_extra=UNTRUSTED)
    failed: list[str] = Field(default=[], json_schema_extra=UNTRUSTED)
    lost: list[str] = Field(default=[], json_schema_extra=UNTRUSTED)
    skipped: list[str] = Field(default=[], json_schema_extra=UNTRUSTED)
    edits: list[str] = Field(default=[], description="Ids of the edits, as revert_edits takes them.")
    measured: dict[str, float] = Field(
        default={}, description="Means over the edits: forms not learned, what stays."
    )
    perplexity_ratio: float | None = Field(None, description="Perplexity after, divided by that before.")
    data_set: dict[str, Any] = Field(
        default={}, description="Rates of the data set's own questions, by its kinds."
    )
    state_hash: str = ""
    next: str = ""
