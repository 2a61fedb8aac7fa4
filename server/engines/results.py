"""Results of the tools about engines."""

from __future__ import annotations

from pydantic import Field

from server.exchange.distillation import Distillation
from server.results import ModelText, Result


class EngineRow(Result):
    """One engine that was named at start, and what it holds."""

    name: str
    kind: str
    push: str = Field(description='"always": after each change; "asked": by push_edits.')
    reachable: bool = Field(description="It answers now. That does not say what it holds.")
    problem: str = Field("", description="Why it cannot be used, or what the last proof found.")
    holds: str | None = Field(None, description="Weights hash of the edits it was last proven to hold.")
    edit_ids: list[str] = Field(default=[], description="Those edits.")
    current: bool = Field(
        False, description="They are the edits that are active now, except those in `left_out`."
    )
    left_out: list[str] = Field(
        default=[],
        description="Active edits that it was not given: left out of the push; steering is never handed over.",
    )
    version: str | None = Field(None, description="Name of what it was given.")
    adapter: str | None = Field(None, description="Name of the adapter or model that has the edits.")
    proven: str | None = Field(None, description="When that was proven last.")


class EngineList(Result):
    engines: list[EngineRow]
    next: str = ""


class ProbeAnswer(Result):
    """One prompt that an engine does not answer as the corrected model does."""

    kind: str
    edit_id: str | None
    prompt: ModelText
    difference: float | None = Field(description="Greatest difference of log-probabilities; null: no answer.")
    to_base: float | None = Field(description="The same from the unedited model.")
    said: ModelText = ""
    error: str = ""


class EngineProof(Result):
    """What an engine said, beside the corrected model."""

    engine: str
    kind: str
    proven: bool = Field(description="It answers as the corrected model does, and not as the unedited one.")
    weights_hash: str = Field(description="Weights with the edits that it was compared with.")
    held: list[str] = Field(description="Edits it holds.")
    missing: list[str] = Field(description="Edits it does not hold.")
    indistinct: list[str] = Field(
        default=[], description="Edits that cannot be told from the unedited model within the bound."
    )
    gone: bool = Field(True, description="Edits that were reverted are gone from it.")
    probes: int = Field(description="Prompts asked.")
    bound: float = Field(
        description="Difference of log-probabilities within which an answer is the same, nats."
    )
    worst: float | None = Field(description="The greatest difference; null: it returned none.")
    same_answers: float | None = Field(None, description="Share of greedy answers that are the same tokens.")
    far: list[ProbeAnswer] = Field(
        default=[], description="The worst prompts that differ by more than the bound."
    )
    seconds: float


class PushResult(Result):
    """The result of the job of push_edits."""

    engine: str
    summary: str = Field("", description="What it holds now, and what that cost where memories were taught.")
    version: str = Field(description="Name of what was handed over.")
    edit_ids: list[str]
    left_out: list[str] = Field(default=[], description="Active edits that act beside the weights.")
    ranks: dict[str, int] = Field(default={}, description="Rank by weight of an adapter.")
    distilled: Distillation | None = Field(
        None,
        description="Memories whose answers were trained into the weights; what that lost.",
    )
    proof: EngineProof
    before: EngineProof | None = Field(None, description="The same comparison before the push.")
    rolled_back: bool = Field(False, description="The proof failed and the engine has its former state back.")
    restored: bool | None = Field(None, description="After that it answers as before the push.")
    problem: str = ""
    warnings: list[str] = Field(default=[], description="What the edits lost by being handed over.")
    seconds: float
