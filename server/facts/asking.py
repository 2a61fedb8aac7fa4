"""Ask the model, and compare what it answers with what is right."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial

from editors.edit import is_question
from editors.errors import InvalidEdit
from editors.measure import CHAT_TOKENS
from editors.model.lm import LM, Prompt, Score
from server.answering.batch import run_alone
from server.answering.request import Answers, Continuation, Request
from server.answering.service import AnswerService
from server.facts.asking_results import Completion, FactChecks, Scored
from server.facts.queries import FactQuery
from server.facts.remembered import remember_checks
from server.facts.verdicts import is_settled, judge, own_answer
from server.request_context import RequestContext
from server.transaction.workspace import Workspace

ANSWER_TOKENS = 12  # generated for each fact
CLOSING = " \t\r\n\"'”’»)]"
SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "؟", "।")
CHECK_ROOM = 24  # tokens that a fact's prompt must leave free


class FactService:
    """Ask the model and check facts.

    The plain methods answer in the calling thread, at its turn. Those for servers (`ask_with_others`,
    `check_with_others`) wait without a thread, and are answered in one batch with what other clients ask.
    """

    def __init__(self, workspace: Workspace, answers: AnswerService) -> None:
        self._workspace, self._answers = workspace, answers

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        chat: bool | None = None,
        temperature: float = 0.0,
        compare_to_base: bool = False,
        seed: int | None = None,
        ctx: RequestContext | None = None,
    ) -> Completion:
        """Continue a text or answer a message (`chat`); with `compare_to_base` also by the unedited model.

        Without `chat` the text decides, see `is_message`. Raises InvalidEdit when the prompt leaves no room for so
        many new tokens.
        """
        started = time.monotonic()
        requests = _asked(
            self._workspace.lm, prompt, max_new_tokens, chat, temperature, compare_to_base, seed, ctx
        )
        answers = [self._answers.run(request) for request in requests]
        return _completion(answers, requests, started)

    async def ask_with_others(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        chat: bool | None = None,
        temperature: float = 0.0,
        compare_to_base: bool = False,
        seed: int | None = None,
        ctx: RequestContext | None = None,
    ) -> Completion:
        """As `ask`. Raises Busy when too many wait."""
        started = time.monotonic()
        requests = _asked(
            self._workspace.lm, prompt, max_new_tokens, chat, temperature, compare_to_base, seed, ctx
        )
        answers = [await self._answers.answer(request) for request in requests]
        return _completion(answers, requests, started)

    def check(self, facts: Sequence[FactQuery], ctx: RequestContext | None = None) -> FactChecks:
        """The model's own answers beside the right ones, with probabilities and verdicts.

        The verdicts are remembered on the ledger: what the model answers rightly is held by edits of the subject.
        """
        started, ctx = time.monotonic(), ctx or RequestContext()
        request = _queried(self._workspace.lm, facts, ctx)
        said = self._answers.run(request)
        own = _OwnScores(self._workspace.lm, facts, said)
        if second := own.unknown(ctx):
            own.add(self._answers.run(second))
        checks = _checks(facts, said, own.found, started)
        remember_checks(self._workspace, checks.facts, ctx)
        return checks

    async def check_with_others(
        self, facts: Sequence[FactQuery], ctx: RequestContext | None = None
    ) -> FactChecks:
        """As `check`. Raises Busy when too many wait."""
        started, ctx = time.monotonic(), ctx or RequestContext()
        request = await asyncio.to_thread(_queried, self._workspace.lm, facts, ctx)
        said = await self._answers.answer(request)
        own = await asyncio.to_thread(_OwnScores, self._workspace.lm, facts, said)
        if second := own.unknown(ctx):
            own.add(await self._answers.answer(second))
        checks = _checks(facts, said, own.found, started)
        await asyncio.to_thread(remember_checks, self._workspace, checks.facts, ctx)
        return checks


def check_now(workspace: Workspace, facts: Sequence[FactQuery], ctx: RequestContext) -> FactChecks:
    """Check facts in the calling thread, which holds the model. Nothing is remembered."""
    started = time.monotonic()
    said = run_alone(workspace.lm, _queried(workspace.lm, facts, ctx))
    own = _OwnScores(workspace.lm, facts, said)
    if second := own.unknown(ctx):
        own.add(run_alone(workspace.lm, second))
    return _checks(facts, said, own.found, started)


def _asked(
    lm: LM,
    text: str,
    max_new_tokens: int,
    chat: bool | None,
    temperature: float,
    compare_to_base: bool,
    seed: int | None,
    ctx: RequestContext | None,
) -> list[Request]:
    """The request to the live model, and with `compare_to_base` the same to the pristine one, with one seed."""
    prompt = lm.prompt(text, chat=is_message(lm, text) if chat is None else chat)
    _refuse_long(lm, prompt, max_new_tokens)
    seed = secrets.randbits(62) if seed is None else seed
    question = Continuation(prompt, max_new_tokens, temperature, seed)
    ctx = ctx or RequestContext()
    return [
        Request([question], base=base, ctx=ctx) for base in ((False, True) if compare_to_base else (False,))
    ]


def is_message(lm: LM, text: str) -> bool:
    """True for a text that is complete, so that a chat model has an answer to it, and nothing to go on with.

    A question, and for a model with a chat template any text that ends as a sentence does. After such a text a model
    made for chat ends its turn at once: the continuation is empty.
    """
    complete = text.rstrip(CLOSING).endswith(SENTENCE_ENDS)
    return is_question(text) or (complete and lm.has_chat_template)


def _completion(answers: Sequence[Answers], requests: Sequence[Request], started: float) -> Completion:
    said, *base = [answer.generations[0] for answer in answers]
    return Completion(
        completion=said.text,
        base_completion=base[0].text if base else None,
        tokens=said.tokens,
        chat=requests[0].questions[0].prompt.chat,
        seconds=time.monotonic() - started,
        memory=said.claim.entry if said.claim else None,
        memory_score=said.claim.score if said.claim else None,
    )


def _refuse_long(lm: LM, prompt: Prompt, extra: int) -> None:
    room = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    length = len(lm.encode(prompt)[0])
    if room is not None and length + extra > room:
        raise InvalidEdit(
            f"prompt has {length} tokens and {extra} more were requested; the model has room for {room}. "
            "Shorten it or lower max_new_tokens."
        )


def tokens_for(text: str) -> int:
    """Tokens generated for an answer: a chat answer may be a sentence."""
    return max(ANSWER_TOKENS, CHAT_TOKENS) if is_question(text) else ANSWER_TOKENS


def _queried(lm: LM, facts: Sequence[FactQuery], ctx: RequestContext | None) -> Request:
    """Every distinct prompt to continue, every answer and alternative to score."""
    prompts = {fact.text: lm.prompt(fact.text) for fact in facts}
    for prompt in prompts.values():
        _refuse_long(lm, prompt, CHECK_ROOM)
    right: dict[str, list[str]] = {}
    for fact in facts:
        right.setdefault(fact.text, []).extend(fact.answers)
    questions = [
        Continuation(prompt, tokens_for(text), logprobs=0, until=partial(is_settled, text, right[text]))
        for text, prompt in prompts.items()
    ]
    pairs = [(prompts[f.text], answer) for f in facts for answer in (*f.answers, *f.alternatives)]
    return Request(questions, pairs, ctx=ctx or RequestContext())


class _OwnScores:
    """How probable the model's own answers are, where they are not the right ones.

    `found`: log-probability by prompt and answer. Where an answer's tokens are the first ones that were generated, it
    is known from there.
    """

    def __init__(self, lm: LM, facts: Sequence[FactQuery], said: Answers) -> None:
        self._lm = lm
        texts = dict.fromkeys(fact.text for fact in facts)
        generated = {text: g.logprobs or () for text, g in zip(texts, said.generations, strict=True)}
        self._own = dict.fromkeys(own for own in _own_answers(facts, said) if own is not None)
        self.found: dict[tuple[str, str], float] = {}
        for text, answer in self._own:
            ids = lm.answer_ids(lm.prompt(text), answer)
            first = generated[text][: len(ids)]
            if [token.id for token in first] == ids:
                self.found[text, answer] = sum(token.logprob for token in first)

    @property
    def _left(self) -> list[tuple[str, str]]:
        return [own for own in self._own if own not in self.found]

    def unknown(self, ctx: RequestContext) -> Request | None:
        """A request that scores the others; None where there are none."""
        pairs = [(self._lm.prompt(text), answer) for text, answer in self._left]
        return Request([], pairs, ctx=ctx) if pairs else None

    def add(self, said: Answers) -> None:
        """Take in the answers to that request."""
        self.found |= zip(self._left, (score.logprob for score in said.scores), strict=True)


def _own_answers(facts: Sequence[FactQuery], said: Answers) -> list[tuple[str, str] | None]:
    """(prompt, what the model says) of each fact whose verdict depends on how probable that is."""
    answers = _answers(facts, said)
    return [own_answer(fact.text, answers[fact.text], fact.answers) for fact in facts]


def _answers(facts: Sequence[FactQuery], said: Answers) -> dict[str, str]:
    texts = dict.fromkeys(fact.text for fact in facts)
    return {text: g.text.strip() for text, g in zip(texts, said.generations, strict=True)}


def _checks(
    facts: Sequence[FactQuery], said: Answers, own_scores: Mapping[tuple[str, str], float], started: float
) -> FactChecks:
    answers = _answers(facts, said)
    own = _own_answers(facts, said)
    scores = iter(said.scores)
    checks = []
    for fact, mine in zip(facts, own, strict=True):
        expected = [_scored(answer, next(scores)) for answer in fact.answers]
        alternatives = [_scored(answer, next(scores)) for answer in fact.alternatives]
        p = math.exp(own_scores[mine]) if mine is not None else None
        checks.append(judge(fact.text, answers[fact.text], expected, alternatives, p))
    return FactChecks(facts=checks, seconds=time.monotonic() - started)


def _scored(text: str, score: Score) -> Scored:
    return Scored(text=text, logprob=score.logprob, tokens=score.tokens, rank=score.rank)
