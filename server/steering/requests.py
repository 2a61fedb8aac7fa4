"""The requests of the steering service, as plain values. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from editors.steering.choices import Answers, Combine, Method, Positions
from editors.steering.pairs import Pair
from server.steering.results import Score

TEXT_TOKENS = 24
"""Tokens of every text that is generated to measure a dose."""


@dataclass(frozen=True)
class VectorRequest:
    """Make a vector from pairs, a file of pairs (`path`), or instructions."""

    name: str
    method: Method = "caa"
    pairs: Sequence[Pair] | None = None
    path: str | None = None
    answers: Answers = "as_given"
    positive_prompt: str | None = None
    negative_prompt: str | None = None
    layers: Sequence[int] | None = None
    positions: Positions = "answer"
    replace: bool = False
    reason: str | None = None


class When(BaseModel):
    """A condition: steer only tokens whose state has a cosine above a threshold with another vector's direction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: str = Field(description="Vector whose direction is compared.")
    above: float = Field(description="Least cosine.")
    layer: int | None = Field(None, description="Layer whose state is compared.")


@dataclass(frozen=True)
class DoseRequest:
    """Switch a vector on at a multiplier (0: off)."""

    name: str
    multiplier: float
    layers: Sequence[int] | None = None
    combine: Combine = "add"
    prompt_tokens: bool = True
    sample_prompt: str | None = None
    reason: str | None = None
    mode: Literal["add", "ablate"] = "add"
    when: When | None = None


@dataclass(frozen=True)
class CalibrationRequest:
    """Find the strongest dose within a bound on the perplexity ratio; `both`: the strongest negative one too."""

    name: str
    max_perplexity_ratio: float = 1.5
    layers: Sequence[int] | None = None
    both: bool = True


@dataclass(frozen=True)
class EvaluationRequest:
    """Measure a score at several multipliers."""

    name: str
    prompts: Sequence[str] | None = None
    multipliers: Sequence[float] | None = None
    score: Score = "sentiment"
    completions: Sequence[str] | None = None  # of score "completion"
    pairs: Sequence[Pair] | None = None  # of score "choice"
    path: str | None = None  # a file of them
    answers: Answers = "as_given"
    layers: Sequence[int] | None = None
    chat: bool | None = None
    max_new_tokens: int = TEXT_TOKENS
    combine: Combine = "add"
    prompt_tokens: bool = True
