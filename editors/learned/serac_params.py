"""The parameters of a SERAC training."""

from __future__ import annotations

from pydantic import Field

from editors.constants import DEFAULT_MODEL, assumed, tuned
from editors.learned.scope import DEFAULT
from editors.learned.training_params import TrainingParams


class SeracTraining(TrainingParams):
    """Parameters of a SERAC training run."""

    encoder: str = Field(
        DEFAULT, description='Sentence encoder: "default" (MiniLM), a folder in HOME/data, or a hub id.'
    )
    records: int = Field(
        assumed(480, "training records of SERAC's adapter at most"),
        ge=8,
        description="Training records of the adapter at most. Of more, a random sample is used.",
    )
    draws: int = Field(
        tuned(
            3,
            "times that the pairs of SERAC's judge are drawn from all records",
            models=DEFAULT_MODEL,
            command="python -m benchmarks.learned serac",
            figure="scope accuracy .9905 with all records drawn 3 times, .970 before",
        ),
        ge=1,
        le=20,
        description="Times that the judge's pairs are drawn from all records.",
    )
    judge_epochs: int = Field(
        assumed(30, "passes over the pairs of SERAC's judge"),
        ge=1,
        le=10_000,
        description="Passes over the judge's pairs.",
    )
    layer: int | None = Field(
        None, ge=0, description="First layer with an adapter. None: the middle of the model."
    )
    rank: int = Field(assumed(8, "rank of SERAC's adapter"), ge=1, le=512, description="Rank of the adapter.")
    steps: int = Field(
        assumed(80, "training steps of SERAC's adapter at most"),
        ge=1,
        le=1_000_000,
        description="Training steps of the adapter at most.",
    )
    group: int = Field(
        assumed(8, "prompts in one step of SERAC's adapter"),
        ge=1,
        le=256,
        description="Prompts in one step.",
    )
    learning_rate: float = Field(
        assumed(1e-3, "Adam's step size for SERAC's adapter"),
        gt=0,
        le=1,
        description="Adam's step size for the adapter.",
    )
    c_loc: float = Field(
        assumed(0.5, "weight of SERAC's loss on prompts that the edit is not about"),
        ge=0,
        description="Weight of the loss that keeps prompts which the edit is not about.",
    )
    distractors: float = Field(
        assumed(0.25, "share of SERAC's training prompts with an edit about something else"),
        ge=0,
        le=0.9,
        description="Share of prompts with an edit about something else.",
    )
    evaluate_every: int = Field(20, ge=1, description="Steps between validations (and checkpoints).")
    patience: int = Field(
        assumed(3, "validations without a better one after which SERAC's training stops"),
        ge=1,
        description="Validations without a better one after which the training stops.",
    )
