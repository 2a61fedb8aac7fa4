"""Results of a rebase: counts first, ids as ranges, lists short. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from server.results import UNTRUSTED, Quoting


class Rebase(Quoting):
    """What carrying edits over to the loaded model did, or would do."""

    job_id: str
    status: str = Field(description="planned, rebased, running, failed ...")
    from_model: str = Field("", description="The model whose edits they are, with its base hash.")
    summary: str = Field("", description="Counts first.")
    outcomes: dict[str, dict[str, Any]] = Field(
        default={},
        description="right (the model says it already: no edit), kept (the old patch), anew (computed on this model), "
        "there (was carried before), left_out: how many, and the old ids as ranges.",
    )
    left_out: list[str] = Field(default=[], json_schema_extra=UNTRUSTED, description="And why; at most 10.")
    lost: list[str] = Field(
        default=[],
        json_schema_extra=UNTRUSTED,
        description="Carried, or right before, but not said in the end.",
    )
    not_carried: list[str] = Field(
        default=[], description="Steering and adapters without facts, and what to do about them."
    )
    edits: list[str] = Field(default=[], description="The new ids, as revert_edits takes them.")
    measured: dict[str, float] = Field(
        default={}, description="Means over the edits: forms not learned, what stays."
    )
    perplexity_ratio: float | None = Field(None, description="Perplexity after, divided by that before.")
    state_hash: str = ""
    next: str = ""
