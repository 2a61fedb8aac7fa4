"""Results of asking the model: completions, checked facts, and which edit says an answer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from server.factsets.results import SetCheck
from server.results import UNTRUSTED, ModelText, Quoting, Result

Verdict = Literal["agrees", "differs", "unsure"]


class Completion(Quoting):
    completion: ModelText
    base_completion: ModelText | None = Field(None, description="The same from the pristine model.")
    tokens: int
    chat: bool = Field(False, description="The prompt was sent as a message, through the chat template.")
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
    why: str = Field("", description="Why the verdict is not simply agrees or differs.")


class FactChecks(Quoting):
    rounded: ClassVar[bool] = True

    facts: list[FactCheck] = Field(default=[])
    set: SetCheck | None = Field(None, description="With `set`: the verdicts of the fact set.")
    seconds: float


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
