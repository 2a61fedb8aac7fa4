"""Results of locating: sites, best layers, and the trade-off between layers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.facts.results import LayerCandidate
from server.results import ModelText, Quoting, Result

LocateMethod = Literal["causal_trace", "knowledge_neurons", "logit_lens", "attribution_patching"]


class LocatedSite(Result):
    """One place in the model, and its effect on the answer."""

    layer: int
    token: int = Field(description="Index of the token in the prompt (of the decoder's in T5).")
    text: str = Field(description="That token.")
    component: str = Field(description="state, mlp, attention, neuron, lens ...")
    effect: float = Field(description="Its effect, in `unit`.")
    spread: float | None = Field(None, description="Standard error of the effect over the noise samples.")
    neuron: int | None = Field(None, description="Index of the neuron among the MLP's.")


class FactLocation(Quoting):
    """Where one method finds a fact."""

    method: LocateMethod
    prompt: str
    subject: str
    answer: ModelText = Field(
        description="The answer that was traced: `target`, or the model's own next token."
    )
    tokens: list[str] = Field(description="The prompt's tokens, as they are counted in `sites`.")
    subject_tokens: list[int]
    sites: list[LocatedSite] = Field(description="The strongest sites, strongest first.")
    best_layer: int
    confidence: float | None = Field(
        None, description="Share of the noise samples whose own best layer is this one or near it."
    )
    unit: str = Field(description="What the effects are measured in.")
    suggestion: str = Field(description="What it means and what to do next.")
    numbers: dict[str, Any] = Field(
        default={}, description="Further measurements of the method: probabilities, total effect, checks."
    )
    event: int | None = Field(None, description="Number of the ledger event that records the trace.")
    seconds: float


class LayerSuggestion(Result):
    method: str
    candidates: list[LayerCandidate]
    best: list[int] = Field(description="The layers to use; remembered for params.layer='auto'.")
    suggestion: str
    remembered: bool = Field(description="False on a read-only server.")
    edits: int = Field(description="How many of the edits were tried.")
    seconds: float
