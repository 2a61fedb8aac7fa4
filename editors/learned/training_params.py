"""The parameters that every training of a learned editor has."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TrainingParams(BaseModel):
    """Parameters of any training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation: int = Field(
        40,
        ge=4,
        le=2000,
        description="Validation records. They share no subject with the training records.",
    )
    seed: int = Field(0, ge=0, description="Seed of the data order, the prompts and the initial weights.")
