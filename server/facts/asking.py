"""Ask the model, and compare what it answers with what is right."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from editors.constants import assumed
from editors.edit import is_question
from editors.errors import InvalidEdit
from editors.measure import ask
from editors.model.lm import LM, Prompt, Score
from editors.scoring import answered_with, short_answer
from server.facts.queries import FactQuery
from server.facts.remembered import remember_checks
from server.facts.results import Completion, FactCheck, FactChecks, Scored
from server.request_context import RequestContext
from server.transaction.workspace import Workspace

PROBABLE = assumed(
    0.1,
    "Mean token probability above which an expected answer counts as likely, though the greedy answer is another one: "
    "the verdict is then unsure.",
    "Set by hand. In a trial of 60 clear errors 13 had the verdict unsure.",
)
ANSWER_TOKENS = 12  # generated for each fact
CHECK_ROOM = 24  # tokens that a fact's prompt must leave free


class FactService:
    """Ask the model and check facts. Takes the model's lock."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        chat: bool = False,
        temperature: float = 0.0,
        compare_to_base: bool = False,
        seed: int | None = None,
        ctx: RequestContext | None = None,
    ) -> Completion:
        """Continue a text, or with `chat` answer a message; with `compare_to_base` also by the unedited model.

        Raises InvalidEdit when the prompt leaves no room for so many new tokens.
        """
        question = _Question(prompt, max_new_tokens, chat, temperature, compare_to_base, seed)
        with self._workspace.lock:
            (ctx or RequestContext()).check()
            return _ask(self._workspace, question)

    def check(self, facts: Sequence[FactQuery], ctx: RequestContext | None = None) -> FactChecks:
        """The model's own answers beside the right ones, with probabilities and verdicts.

        The verdicts are remembered on the ledger: what the model answers rightly is held by edits of the subject.
        """
        ctx = ctx or RequestContext()
        with self._workspace.lock:
            checks = _check_all(self._workspace.lm, facts, ctx)
        remember_checks(self._workspace, checks.facts, ctx)
        return checks


@dataclass(frozen=True)
class _Question:
    prompt: str
    max_new_tokens: int
    chat: bool
    temperature: float
    compare_to_base: bool
    seed: int | None


def _ask(workspace: Workspace, question: _Question) -> Completion:
    started = time.monotonic()
    lm = workspace.lm
    prompt = lm.prompt(question.prompt, chat=question.chat)
    _refuse_long(lm, prompt, question.max_new_tokens)

    def generate() -> Completion:
        (answer,) = lm.generate(
            [prompt], question.max_new_tokens, temperature=question.temperature, seed=question.seed
        )
        claim = answer.claim
        return Completion(
            completion=answer.text,
            tokens=answer.tokens,
            seconds=0.0,
            memory=claim.entry if claim else None,
            memory_score=claim.score if claim else None,
        )

    live, base = generate(), None
    if question.compare_to_base:
        with workspace.host.pristine():
            base = generate().completion
    return live.model_copy(update={"base_completion": base, "seconds": time.monotonic() - started})


def _refuse_long(lm: LM, prompt: Prompt, extra: int) -> None:
    room = getattr(lm.model.config, "max_position_embeddings", None)
    length = len(lm.encode(prompt)[0])
    if room is not None and length + extra > room:
        raise InvalidEdit(
            f"prompt has {length} tokens and {extra} more were requested; the model has room for {room}. "
            "Shorten it or lower max_new_tokens."
        )


def _check_all(lm: LM, facts: Sequence[FactQuery], ctx: RequestContext) -> FactChecks:
    started = time.monotonic()
    texts = [fact.text for fact in facts]
    for text in texts:
        _refuse_long(lm, lm.prompt(text), CHECK_ROOM)
    ctx.progress(0, 2, "asking the model")
    answers = ask(lm, texts, ANSWER_TOKENS)
    ctx.report(1, 2, "scoring the answers")
    pairs = [(t, a) for f, t in zip(facts, texts, strict=True) for a in (*f.answers, *f.alternatives)]
    scores = iter(lm.score([(lm.prompt(text), answer) for text, answer in pairs]))
    checks = []
    for fact, text in zip(facts, texts, strict=True):
        expected = [_scored(answer, next(scores)) for answer in fact.answers]
        alternatives = [_scored(answer, next(scores)) for answer in fact.alternatives]
        checks.append(_check(text, answers[text], expected, alternatives))
    return FactChecks(facts=checks, seconds=time.monotonic() - started)


def _scored(text: str, score: Score) -> Scored:
    return Scored(text=text, logprob=score.logprob, tokens=score.tokens, rank=score.rank)


def _check(prompt: str, answer: str, expected: list[Scored], alternatives: list[Scored]) -> FactCheck:
    agrees = [e for e in expected if answered_with(prompt, answer, e.text)]
    best = (agrees or sorted(expected, key=lambda e: -e.logprob))[0]
    no_answer = not short_answer(answer)
    likely = not is_question(prompt) and _is_likely(best, alternatives)
    return FactCheck(
        prompt=prompt,
        verdict="agrees" if agrees else "unsure" if no_answer or likely else "differs",
        answer=answer,
        expected=best,
        alternatives=alternatives,
    )


def _is_likely(expected: Scored, alternatives: list[Scored]) -> bool:
    """The expected answer is probable though the greedy one is another, and no alternative beats it."""
    probable = math.exp(expected.logprob / max(expected.tokens, 1)) > PROBABLE
    return probable and all(other.logprob < expected.logprob for other in alternatives)
