"""What a report says of memories that were trained into the weights."""

from __future__ import annotations

from pydantic import Field

from server.results import ModelText, Result


class DistilledEdit(Result):
    """One memory that was trained into the weights. Shares are of wordings that were not trained on; null: none."""

    edit_id: str
    method: str
    said: bool = Field(description="The weights say it after its own prompt, which was taught.")
    live: float | None = Field(description="Share answered with the target by the memory.")
    taught: float | None = Field(description="The same by the weights.")
    lost: list[ModelText] = Field(default=[], description="Wordings that only the memory answers.")
    moved: list[ModelText] = Field(
        default=[], description="Other facts of the subject and neighbours that the weights answer otherwise."
    )
    subject_locality: float | None = Field(None, description="Share of the subject's other facts still said.")
    locality: float | None = Field(None, description="Share of neighbours whose answer did not change.")


class Distillation(Result):
    """Memories trained into the weights, for formats that hold no memory: what that cost, over all of them."""

    edits: list[DistilledEdit]
    said: float
    live: float | None
    taught: float | None
    loss: float | None = Field(description="live - taught.")
    subject_locality: float | None
    locality: float | None
    perplexity_ratio: float = Field(
        description="On ordinary texts: perplexity with the training, divided by that without it."
    )
    seconds: float
