"""What the services of facts and edits answer: the structured results an agent sees, field by field."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from server.engines.results import EngineProof
from server.factsets.results import SetCheck
from server.results import UNTRUSTED, ModelText, Quoting, Result

Verdict = Literal["agrees", "differs", "unsure"]


class Completion(Quoting):
    completion: ModelText
    base_completion: ModelText | None = Field(None, description="The same from the pristine model.")
    tokens: int
    chat: bool = Field(False, description="The prompt was put as a message.")
    seconds: float
    memory: str | None = Field(
        None, description="The memory entry that answered instead of the weights, if any."
    )
    memory_score: float | None = Field(None, description="How sure the scope decision was, 0..1.")


class Scored(Result):
    """How probable an answer is after the prompt."""

    text: str
    logprob: float = Field(
        description="Sum of natural-log token probabilities of the answer after the prompt."
    )
    tokens: int = Field(description="Number of tokens in the answer.")
    rank: int = Field(description="Rank of its first token among all tokens; 0 is the most probable.")


class FactCheck(Result):
    prompt: str
    verdict: Verdict
    answer: ModelText = Field(description="What the model says (greedy continuation).")
    expected: Scored = Field(description="The expected answer (the most probable one if several were given).")
    alternatives: list[Scored] = Field(default=[])
    p_answer: float | None = Field(
        None, description="Probability of what the model says, where it is not right."
    )
    why: str = Field("", description="Why the verdict is not plain.")


class FactChecks(Quoting):
    rounded: ClassVar[bool] = True

    facts: list[FactCheck] = Field(default=[])
    set: SetCheck | None = Field(None, description="With `set`: how the fact set stands.")
    seconds: float


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
        description="partly: kept, and said in some wording, or no other wording could be asked."
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
    seconds: float
    next: str


class EditEffect(Result):
    """What one active edit, or a group that acts only together, does to an answer."""

    edit_ids: list[str]
    fact: str = Field(description="What the edit states.", json_schema_extra=UNTRUSTED)
    method: str
    effect: float = Field(
        description="Log-probability of the answer with it, less that without it, nats; above 0 it makes the answer "
        "more probable."
    )
    changes_answer: bool = Field(description="Without it the model says something else.")
    answer_without: ModelText = Field(description="What the model says without it.")


class Explanation(Quoting):
    rounded: ClassVar[bool] = True

    prompt: str
    answer: ModelText = Field(description="What the model says now.")
    base_answer: ModelText = Field(description="What the pristine model says.")
    edited: bool = Field(description="The two differ.")
    effects: list[EditEffect] = Field(
        description="The edits that move the answer, those that change it first."
    )
    not_listed: int = Field(0, description="More edits that move it.")
    active: int = Field(description="Active edits and steering doses.")
    asked_without: int = Field(description="Sets of edits that were left out, one after another.")
    seconds: float
    next: str


class EditOutcome(Result):
    """How well one edit holds. Rates lie in 0..1 and are None when there was nothing to measure them with."""

    edit_id: str | None = None
    subject: str
    prompt: str
    target: str
    before: ModelText = Field(description="The model's greedy answer before.")
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
    kind: Literal["paraphrase", "neighbour", "portability", "form", "sibling", "hold"]
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
    """A fact that was right before the edits and is not now."""

    prompt: str
    before: ModelText
    after: ModelText
    kind: Literal["neighbour", "sibling", "hold", "edit"] = Field(
        description="Another subject's fact, another fact of the subject, one that was held, or an active edit."
    )
    edit_id: str | None = Field(None, description="The active edit that no longer holds.")


class Attempt(Result):
    """One way that was tried, and what came of it."""

    method: str
    params: dict[str, Any] = Field(default={}, description="What differs from the method's defaults.")
    reliability: float | None = None
    forms: dict[str, float] = Field(default={})
    subject_locality: float | None = None
    perplexity_ratio: float | None = None
    failed: list[str] = Field(default=[], description="The bounds that failed.")
    seconds: float
    kept: bool = Field(False, description="It was the best one, which this report is about.")


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
        description="Share of the edit's change that this fact's key feels by the second-moment metric; 1 is all."
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
        description="Why this method, if chosen automatically; what of the model's profile was used.",
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


class EditRow(Result):
    """One line of the ledger."""

    edit_id: str
    status: Literal["active", "reverted", "replaced", "rejected"]
    subject: str
    prompt: str
    target: str
    previous: str | None
    method: str
    reliability: float | None
    generality: float | None
    locality: float | None
    reason: str | None
    source: str | None
    client: str | None
    created: str
    changed: str


class EditList(Result):
    rounded: ClassVar[bool] = True

    edits: list[EditRow]
    next_cursor: str | None = None
    total: int


class Event(Result):
    seq: int
    at: str
    kind: str
    client: str | None = Field(description="The name that the client gave itself.")
    identity: str | None = Field(None, description="Whose token the call had, checked by the server.")
    request_id: str | None
    reason: str | None
    payload: dict[str, Any] = Field(json_schema_extra=UNTRUSTED)
    hash: str


class Measurement(Result):
    at: str
    occasion: str = Field(description="apply, reapply, audit ...")
    values: dict[str, Any] = Field(json_schema_extra=UNTRUSTED)


class EditDetail(Quoting):
    edit: EditRow
    request: dict[str, Any]
    params: dict[str, Any]
    patch: dict[str, Any] = Field(
        description="Blob hash, bytes, kind, tensors with shapes, row in the batch."
    )
    weights_hash_before: str
    weights_hash_after: str
    batch: list[str] = Field(default=[], description="Edits of the same call.")
    replaces: list[str] = Field(default=[])
    replaced_by: str | None = None
    located: dict[str, Any] | None = Field(
        None, description="The latest trace of the same subject and prompt (locate_fact) before the edit."
    )
    measurements: list[Measurement]
    events: list[Event]


class Integrity(Result):
    chain: bool = Field(description="The event hash chain is unbroken and the rows agree with it.")
    blobs: bool = Field(description="Every patch file is there and has its hash.")
    weights: bool = Field(description="The live weights equal pristine weights plus the active patches.")
    problems: list[str] = Field(default=[])


class Audit(Quoting):
    rounded: ClassVar[bool] = True

    summary: str = Field("", description="Counts first: how many edits hold, and what else changed.")
    job_id: str = Field("", description="The job that asks them, where they are too many for a call.")
    edits: list[EditOutcome] = Field(
        description="Of up to five edits each; of more those that do not hold, at most eight (detail='full': all)."
    )
    not_listed: str = Field("", description="In a short report: what is counted and not listed.")
    forms: dict[str, float] = Field(
        default={}, description="Means of the edits' forms; with detail='full' of all that there are."
    )
    subject_locality: float | None = Field(
        None,
        description="With detail='full': share of the subjects' other facts that the pristine model has too.",
    )
    changed: list[Changed] = Field(
        default=[], description="Facts that the pristine model says rightly and the live one does not."
    )
    changed_count: int = 0
    measured_now: int = Field(0, description="Edits asked now; the others were audited in this very state.")
    holding: int
    failing: list[str]
    integrity: Integrity | None = Field(None, description="Null where an engine was asked.")
    drift: Drift | None = None
    engine: EngineProof | None = Field(None, description="What the engine said that was asked.")
    repaired: list[str] = Field(default=[])
    weights_hash: str
    seconds: float
    next: str


class Rows(Quoting):
    columns: list[str]
    rows: list[list[str | int | float | None]] = Field(json_schema_extra=UNTRUSTED)
    truncated: bool
    seconds: float


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
ForgetReport.model_rebuild()
