"""What the services of facts and edits answer: the structured results an agent sees, field by field."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from editors.edit import ProbeKind
from server.results import ModelText, Quoting, Result


class EditOutcome(Result):
    """How well one edit holds. Rates are from 0 to 1, and None if there was nothing to measure them with."""

    edit_id: str | None = None
    subject: str
    prompt: str
    target: str
    before: ModelText = Field(
        description="The model's greedy answer before, without the edits that this one replaces."
    )
    after: ModelText = Field(description="The model's greedy answer after.")
    reliability: float = Field(description="1 when the greedy answer to the prompt is the target.")
    generality: float | None = Field(None, description="Share of paraphrases answered with the target.")
    locality: float | None = Field(None, description="Share of neighbours whose answer did not change.")
    portability: float | None = Field(None, description="Share of probes answered as they should be.")
    forms: dict[str, float] = Field(
        default={},
        description="Share answered with the target in forms that were not learned: statement, reworded, chat, "
        "chat_reworded, and language where the model knew the fact in another language.",
    )
    subject_locality: float | None = Field(
        None,
        description="Share of the subject's other facts that are still said; those that the edit held are left out.",
    )
    fluency: float | None = Field(
        None, description="Weighted bigram and trigram entropy of generated text, bits."
    )
    looping: bool = Field(
        False, description="The answer after says the same words again and again, which is never a hit."
    )
    p_target_before: float = Field(description="Probability of the target after the prompt, before.")
    p_target_after: float = Field(description="Probability of the target after the prompt, after.")
    details: list[ProbeOutcome] = Field(
        default=[],
        description="Every probe on the ledger (show_edit); in a report those that did not hold, and the caller's own.",
    )


class ProbeOutcome(Result):
    kind: ProbeKind
    prompt: str
    expected: str
    before: ModelText = Field("", description="Left out of forms, which are asked after the edit only.")
    after: ModelText
    held: bool
    form: str = Field(
        "",
        description="statement, reworded, chat, chat_reworded or language; of another fact statement or chat.",
    )
    trained: bool = Field(
        False, description="The edit was trained on this prompt, so that it is left out of the rates."
    )

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.kind == "form" and not self.before:
            values.pop("before", None)
        return values


class Changed(Result):
    """A fact that was right before the edits and is wrong now."""

    prompt: str
    before: ModelText
    after: ModelText
    kind: Literal["neighbour", "sibling", "hold", "edit"] = Field(
        description="Another subject's fact, another fact of the subject, one that was held, or an active edit."
    )
    edit_id: str | None = Field(None, description="The active edit that no longer holds.")


class Attempt(Result):
    """One way that was tried, and its result."""

    method: str
    params: dict[str, Any] = Field(default={}, description="What differs from the method's defaults.")
    reliability: float | None = None
    forms: dict[str, float] = Field(default={})
    subject_locality: float | None = None
    perplexity_ratio: float | None = None
    failed: list[str] = Field(default=[], description="The bounds that failed.")
    seconds: float
    kept: bool = Field(
        False, description="The best one, which this report describes. A rejected call keeps none."
    )


class Drift(Result):
    """How far the model has moved from the pristine one on fixed canary texts."""

    kl: float = Field(description="Mean KL(pristine || live) of next-token distributions, nats.")
    perplexity_before: float = Field(description="Perplexity of the pristine model on the canary texts.")
    perplexity_after: float = Field(description="Perplexity of the live model on the same texts.")


class Nearby(Result):
    """A known fact near the edit's key, and how its answer moves."""

    kind: Literal["edit", "canary"] = Field(description="An active edit of the ledger, or a canary text.")
    edit_id: str | None = None
    prompt: str
    overlap: float = Field(
        description="Overlap of this fact's key with the edit's, by the second-moment metric: its share of "
        "the edit's change; 1 is all."
    )
    before: ModelText = Field(description="The model's answer before.")
    after: ModelText = Field(description="The model's answer after.")
    moved: bool


class EditReport(Quoting):
    """The report of preview, apply and reapply."""

    rounded: ClassVar[bool] = True

    status: Literal["previewed", "applied", "rejected", "unchanged"]
    summary: str = Field("", description="Counts first: how many edits hold, and what else changed.")
    edit_ids: list[str] = Field(
        description="Of more than 50, runs as ranges, which every tool takes: e1-e60."
    )
    preview_id: str = Field(
        "", description="Of a preview: apply_edits(preview_id=...) keeps what it computed."
    )
    method: str
    method_reason: str = Field(
        "",
        description="Why this method, if chosen automatically; what was used of the model's profile.",
    )
    params: dict[str, Any]
    results: list[EditOutcome] = Field(
        description="Of up to five edits each; of more those that do not hold, at most eight (detail='full': all)."
    )
    holding: int | None = Field(None, description="In a short report: how many edits hold.")
    failing: list[str] = Field(default=[], description="In a short report: the ids of those that do not.")
    not_listed: str = Field("", description="In a short report: what is counted and not listed.")
    reliability: float | None = Field(None, description="Mean over the edits.")
    generality: float | None = None
    locality: float | None = None
    portability: float | None = None
    forms: dict[str, float] = Field(default={}, description="Means of the edits' forms.")
    subject_locality: float | None = Field(
        None, description="Share of the subjects' other facts that are kept."
    )
    perplexity_ratio: float | None = Field(
        None, description="Perplexity on the canary texts after this call, divided by that before it."
    )
    changed: list[Changed] = Field(
        default=[], description="Facts that were right before and are not now, at most 20."
    )
    changed_count: int = 0
    tried: list[Attempt] = Field(default=[], description="What method=auto tried, in order.")
    left_out: list[str] = Field(
        default=[], description="With partial: the edits that did not hold and were not kept, and why."
    )
    drift: Drift | None = None
    nearby: list[Nearby] = Field(
        default=[], description="With explain: the known facts nearest to the edits, nearest first."
    )
    failed_guard: list[str] = Field(
        default=[], description="The bounds that failed, with the measured values."
    )
    weights_hash: str
    state_hash: str = Field("", description="The first 16 digits of model_status's: it covers memories too.")
    seconds: float
    warnings: list[str] = Field(default=[])
    next: str = Field(description="What to do next.")


class Answered(Result):
    prompt: str
    answer: ModelText


class RevertReport(Quoting):
    reverted: list[str]
    unchanged: list[str] = Field(default=[], description="Asked for but not active before; nothing to do.")
    weights_hash: str
    state_hash: str = Field("", description="The first 16 digits of model_status's: it covers memories too.")
    computed_on_top: list[str] = Field(
        default=[], description="Active edits that were computed while a reverted one was in the weights."
    )
    restored: list[Answered]
    seconds: float
    next: str = ""


class MethodLine(Result):
    """A method in short."""

    name: str
    when: str = Field(description="When to choose it.")
    ready: bool = Field(description="Whether it can be used at once; list_methods(name) has what it needs.")
    exportable: bool = Field(
        description="True when export_edits can write its edits as weights or an adapter."
    )


class MethodInfo(MethodLine):
    """All about a method."""

    family: str
    title: str
    description: str
    source: str = Field(description="Paper, with its identifier.")
    cost: str
    needs: list[str]
    kind: str = Field(description="The patch it makes: weight, hook, route, adapter.")
    batch: bool = Field(description="True when several edits in one call are solved together.")
    params: dict[str, Any] = Field(description="JSON schema of `params`, with this model's defaults.")


class MethodList(Result):
    methods: list[MethodInfo | MethodLine] = Field(
        description="All in short, or the one that was named with the schema of its parameters."
    )
    auto: str = Field(description='How `method="auto"` chooses.')


class LayerCandidate(Result):
    """How edits made in one layer (or one set of layers) hold."""

    layers: list[int]
    reliability: float
    generality: float | None = None
    locality: float | None = None
    p_target: float = Field(description="Mean probability of the targets after the edits.")
    drift: float = Field(
        description="Distance of the edited model on the canary texts, nats; mean over the patches."
    )
    score: float = Field(description="Harmonic mean of the rates that could be measured.")
    traced_effect: float | None = Field(
        None, description="What causal tracing gives the MLPs around it, for comparison."
    )
    default: bool = Field(False, description="The method's own choice without `layer`.")


EditOutcome.model_rebuild()
