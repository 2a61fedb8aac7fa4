"""Results of forgetting facts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from server.facts.results import Changed
from server.results import UNTRUSTED, ModelText, Quoting, Result


class StillSaid(Result):
    """A wording that is still answered with what was to be forgotten."""

    prompt: str
    answer: ModelText


class Forgotten(Result):
    """How well one fact is suppressed: shares of answers that have the old answer anywhere in them."""

    edit_id: str | None = None
    also_edited: list[str] = Field(
        default=[], description="Edits for questions that gave it away too; other words for the same answer."
    )
    subject: str
    prompt: str
    answer: str = Field(description="The answer that is to be forgotten.", json_schema_extra=UNTRUSTED)
    before: ModelText = Field(description="What the model said.")
    after: ModelText = Field(description="What it says now.")
    suppressed: bool | None = Field(
        description="The old answer is in no answer, in no wording asked; null where no other wording could be asked."
    )
    asked: int = Field(0, description="Other wordings asked, none of them learned.")
    still_said: list[StillSaid] = Field(
        default=[], description="Wordings that are still answered with it, at most five."
    )
    silenced: list[str] = Field(
        default=[], description="Questions about other things that would now get no answer either."
    )
    said_before: float | None = Field(None, description="In wordings that the edit did not learn, before.")
    said_after: float | None = Field(None, description="In the same wordings, after.")
    said_with_hint_before: float | None = None
    said_with_hint: float | None = Field(
        None, description="After contexts that hint at it without naming it."
    )
    said_after_relearning: float | None = Field(
        None,
        description="In the other wordings, once the model was trained on the statement for five steps: high means "
        "that it was hidden, not gone. Null beside a memory, under which the weights still have it.",
    )
    locality: float | None = None
    subject_locality: float | None = None


class ForgetReport(Quoting):
    rounded: ClassVar[bool] = True

    status: Literal["suppressed", "partly", "rejected"] = Field(
        description="partly: kept, but still said in some wording, or no other wording could be asked."
    )
    summary: str
    edit_ids: list[str]
    method: str
    facts: list[Forgotten]
    failed: list[str] = Field(default=[], description="Why nothing was kept.")
    changed: list[Changed] = Field(default=[], description="Facts that were right before and are not now.")
    changed_count: int = 0
    perplexity_ratio: float | None = None
    hidden: bool = Field(description="A memory beside the weights suppresses it; the weights still have it.")
    note: str = ""
    weights_hash: str
    state_hash: str = Field("", description="The first 16 digits of model_status's: it covers memories too.")
    seconds: float
    next: str
