"""One request of a running batch, and how far it is."""

from __future__ import annotations

from editors.model.decoding import DecodedRow, Decoder
from editors.model.lm import LM, Claim, Generation, Prompt, Route, Score, TokenLogprob
from server.answering.request import Request

PAIRS = 16
"""Answers scored between two looks at whether the client is still there."""


class Started:
    """A request of the running batch, and how far it is."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.scores: dict[int, Score] = {}  # by the index of the pair
        self.scored_with: dict[int, list[int]] = {}  # by the index of the question, the pairs scored with it
        self.reads: list[list[TokenLogprob]] = []
        self.rows: dict[int, DecodedRow] = {}  # by the index of the question
        self.waiting: list[int] = []  # questions that have no place in the batch yet
        self.claimed: dict[int, tuple[Route, Claim]] = {}  # questions that a memory will answer
        self.done: dict[int, Generation] = {}
        self.tokens = 0  # that questions have or had at most, for the progress
        self.said = -1

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.request.questions)

    def score(self, lm: LM, decoder: Decoder | None) -> None:
        """Score the answers of the request; those to a question that waits are scored when its prompt is read."""
        request, waiting = self.request, self._scored_later(lm, decoder)
        apart = []
        for pair, (prompt, _) in enumerate(request.pairs):
            if prompt in waiting:
                self.scored_with.setdefault(waiting[prompt], []).append(pair)
            else:
                apart.append(pair)
        for at in range(0, len(apart), PAIRS):
            request.ctx.report(at, len(request.pairs) + len(request.questions), "scoring answers")
            some = apart[at : at + PAIRS]
            scores = lm.score([request.pairs[pair] for pair in some])
            self.scores |= dict(zip(some, scores, strict=True))

    def _scored_later(self, lm: LM, decoder: Decoder | None) -> dict[Prompt, int]:
        """The prompts whose answers the decoder can score where it reads them, with their questions."""
        questions = self.request.questions
        if decoder is None or not self.request.pairs or not self.waiting:
            return {}
        longest = max(len(lm.encode(q.prompt)[0]) + q.max_new_tokens for q in questions)
        if not decoder.scores(2 * longest):
            return {}
        return {questions[i].prompt: i for i in reversed(self.waiting)}

    def answers_of(self, lm: LM, question: int) -> list[list[int]]:
        """Token ids of the answers that are scored with a question."""
        return [lm.answer_ids(*self.request.pairs[pair]) for pair in self.scored_with.get(question, ())]

    def end(self, question: int, said: Generation) -> None:
        """Take in what was said to a question, and the scores that came with it."""
        scores = self.rows.pop(question).scores
        self.scores |= dict(zip(self.scored_with.get(question, ()), scores, strict=True))
        self.done[question] = said
