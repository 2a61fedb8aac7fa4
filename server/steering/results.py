"""Results of the steering tools."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.results import ModelText, Quoting, Result

Score = Literal["sentiment", "refusal", "length", "completion", "choice"]


class LayerSeparation(Result):
    """How well one layer separates the two sides, on pairs that it was not fitted to."""

    layer: int
    accuracy: float | None = Field(description="Share of held-out pairs separated, 0..1; null for one pair.")
    d_prime: float | None = Field(description="Distance of the sides in standard deviations, held out.")
    shift: float = Field(description="Length of the mean difference in units of the mean hidden norm.")


class VectorReport(Result):
    """A vector that was computed and recorded."""

    name: str
    method: str
    layers: list[int] = Field(description="The layers it acts after unless set_steering names others.")
    norm: float = Field(description="Mean hidden norm of those layers: what a multiplier of 1 adds.")
    separation: float | None = Field(
        description="Mean held-out distance of the two sides there, in standard deviations (d')."
    )
    accuracy: float | None = Field(None, description="Mean share of held-out pairs separated there.")
    pairs: int
    sweep: list[LayerSeparation] = Field(default=[], description="Every layer; the picture shows it.")
    trained: dict[str, float] = Field(default={}, description="lm_steer: loss before and after, strength.")
    seconds: float
    warnings: list[str] = Field(default=[])
    next: str


class VectorRow(Result):
    name: str
    method: str
    layers: list[int]
    norm: float
    separation: float | None
    pairs: int
    reason: str | None
    client: str | None
    created: str
    active: bool


class ActiveDose(Result):
    """One vector that is switched on."""

    edit_id: str = Field(description="Its id on the ledger; revert_edits takes it off too.")
    name: str
    method: str
    multiplier: float
    layers: list[int]
    combine: str
    prompt_tokens: bool = Field(description="Whether the prompt's tokens are steered too.")
    mode: str = Field("add", description="ablate: the direction is taken out of every state.")
    when: dict[str, Any] | None = Field(None, description="Its condition: vector, layer, above.")
    reason: str | None
    client: str | None
    since: str


class Sample(Result):
    prompt: str
    before: ModelText
    after: ModelText
    cosine: float | None = Field(
        None,
        description="With a condition: cosine of the state at the prompt's last token with its direction.",
    )


class SteeringState(Quoting):
    """What is switched on now, and its effect on one prompt."""

    active: list[ActiveDose]
    changed: bool = Field(description="False if nothing had to be changed.")
    sample: Sample
    weights_hash: str = Field(description="Hash of the weights, which steering never changes.")
    state_hash: str = Field(
        description="Hash of the weights and everything that acts beside them; steering changes it."
    )
    perplexity_ratio: float = Field(
        description="Perplexity on fixed texts, live over pristine (edits included)."
    )
    seconds: float
    warnings: list[str] = Field(default=[])
    next: str


class DosePoint(Result):
    multiplier: float
    perplexity_ratio: float = Field(
        description="The greater of the two ratios below; it is compared with the bound."
    )
    text_ratio: float = Field(
        description="Perplexity of fixed neutral texts: steered model over unsteered model."
    )
    generation_ratio: float | None = Field(
        description="Perplexity, by the unsteered model, of what the steered model writes over that of what the "
        "unsteered model writes."
    )


class Calibration(Result):
    """The strongest doses within the bound."""

    name: str
    multiplier: float = Field(description="Strongest positive multiplier within the bound.")
    negative_multiplier: float | None = Field(None, description="Strongest negative one, if asked for.")
    max_perplexity_ratio: float
    curve: list[DosePoint] = Field(description="Every dose tried, by multiplier.")
    seconds: float
    next: str


class EvaluationRow(Result):
    multiplier: float
    score: float = Field(description="Mean of the score over the prompts.")
    change: float = Field(description="The score minus that of multiplier 0.")
    perplexity: float | None = Field(
        description="Perplexity of the generated texts by the unsteered model; null where none are written."
    )
    perplexity_ratio: float | None = Field(description="The same over that of multiplier 0.")
    text_ratio: float = Field(description="Perplexity of fixed neutral texts over that of multiplier 0.")


class ScoredText(Result):
    """What the model wrote at one multiplier, and its score."""

    multiplier: float
    text: ModelText
    score: float


class SampleTexts(Result):
    prompt: str
    texts: list[ScoredText] = Field(description="The same prompt at every multiplier, 0 among them.")


class Evaluation(Quoting):
    """Dose against effect."""

    name: str
    score: str
    prompts: int
    table: list[EvaluationRow]
    monotone: bool = Field(description="Whether the score only rises (or only falls) with the multiplier.")
    samples: list[SampleTexts] = Field(default=[])
    seconds: float
    next: str


class SteeringList(Result):
    vectors: list[VectorRow]
    active: list[ActiveDose]


class VectorDeleted(Result):
    deleted: str
    remaining: list[str]


class VectorExport(Result):
    path: str = Field(description="The file, under HOME/exports.")
    format: str
    files: list[str]
    bytes: int
    sha256: str
    info: dict[str, Any] = Field(default={})
