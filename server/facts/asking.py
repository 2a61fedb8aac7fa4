"""What the model says: ask it, and compare its beliefs with facts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from editors.edit import PLACEHOLDER, is_question
from editors.errors import InvalidEdit
from editors.measure import answered_with, ask, short_answer
from editors.model.lm import LM, Prompt, Score
from server.request_context import RequestContext
from server.results import Completion, FactCheck, FactChecks, Scored
from server.transaction.workspace import Workspace

UNSURE = 0.1  # a first answer token less probable than this is no clear answer


@dataclass(frozen=True)
class FactQuery:
    """A belief to check. `expected` may be several answers that are all right."""

    prompt: str
    expected: str | Sequence[str]
    subject: str | None = None
    alternatives: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The prompt with {} filled; raises InvalidEdit when there is nothing to fill it with."""
        if PLACEHOLDER in self.prompt and self.subject is None:
            raise InvalidEdit(
                f"prompt {self.prompt!r} has {{}} but no subject was given; give subject, or write it out"
            )
        return self.prompt.replace(PLACEHOLDER, self.subject or "").rstrip()

    @property
    def answers(self) -> list[str]:
        return [self.expected] if isinstance(self.expected, str) else list(self.expected)


def complete(
    workspace: Workspace,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    temperature: float,
    compare: bool,
    seed: int | None,
) -> Completion:
    """Continue a text or answer a message, live and (with `compare`) pristine."""
    started = time.monotonic()
    asked = workspace.lm.prompt(prompt, chat=chat)
    _refuse_long(workspace.lm, asked, max_new_tokens)
    live = workspace.lm.generate([asked], max_new_tokens, temperature=temperature, seed=seed)[0]
    base = None
    if compare:
        with workspace.host.pristine():
            base = workspace.lm.generate([asked], max_new_tokens, temperature=temperature, seed=seed)[0].text
    return Completion(
        completion=live.text,
        base_completion=base,
        tokens=live.tokens,
        seconds=time.monotonic() - started,
        memory=live.claim.entry if live.claim else None,
        memory_score=live.claim.score if live.claim else None,
    )


def _refuse_long(lm: LM, prompt: Prompt, extra: int) -> None:
    room = getattr(lm.model.config, "max_position_embeddings", None)
    length = len(lm.encode(prompt)[0])
    if room is not None and length + extra > room:
        raise InvalidEdit(
            f"prompt has {length} tokens and {extra} more were asked for; the model has room for {room}. "
            "Shorten it or lower max_new_tokens."
        )


def check_facts(workspace: Workspace, facts: Sequence[FactQuery], ctx: RequestContext) -> FactChecks:
    """The model's own answers beside the right ones, with probabilities."""
    started = time.monotonic()
    texts = [f.text for f in facts]
    for text in texts:
        _refuse_long(workspace.lm, workspace.lm.prompt(text), 24)
    ctx.progress(0, 2, "asking the model")
    answers = ask(workspace.lm, texts, 12)
    ctx.check()
    ctx.progress(1, 2, "scoring the answers")
    pairs = [(t, a) for f, t in zip(facts, texts, strict=True) for a in (*f.answers, *f.alternatives)]
    scores = iter(workspace.lm.score([(workspace.lm.prompt(t), a) for t, a in pairs]))
    checks = []
    for fact, text in zip(facts, texts, strict=True):
        expected = [_scored(a, next(scores)) for a in fact.answers]
        alternatives = [_scored(a, next(scores)) for a in fact.alternatives]
        checks.append(_check(text, answers[text], expected, alternatives))
    return FactChecks(facts=checks, seconds=time.monotonic() - started)


def _scored(text: str, score: Score) -> Scored:
    return Scored(text=text, logprob=score.logprob, tokens=score.tokens, rank=score.rank)


def _check(prompt: str, answer: str, expected: list[Scored], alternatives: list[Scored]) -> FactCheck:
    agrees = [e for e in expected if answered_with(prompt, answer, e.text)]
    best = (agrees or sorted(expected, key=lambda e: -e.logprob))[0]
    verdict = "agrees" if agrees else "differs"
    if not agrees and (not short_answer(answer) or (not is_question(prompt) and _close(best, alternatives))):
        verdict = "unsure"
    return FactCheck.model_validate(
        {
            "prompt": prompt,
            "verdict": verdict,
            "answer": answer,
            "expected": best,
            "alternatives": alternatives,
        }
    )


def _close(expected: Scored, alternatives: list[Scored]) -> bool:
    """The expected answer is probable though the greedy one is another, and no alternative beats it."""
    likely = math.exp(expected.logprob / max(expected.tokens, 1)) > UNSURE
    return likely and all(a.logprob < expected.logprob for a in alternatives)
