"""The requests that are being answered together: their rows share every forward pass of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import replace

from editors.constants import limit
from editors.errors import Cancelled
from editors.model.decoding import DecodedRow, Decoder, decodes_together
from editors.model.lm import LM, Generation
from editors.model.routes import speaker_of
from editors.model.speaking import Speaker
from server.answering.request import Answers, Continuation, Request
from server.answering.started import Started
from server.answering.stopping import cut

log = logging.getLogger("errata.answering")

ROWS = limit(
    32,
    "prompts that are continued in one batch, at most",
    "memory and turns: further prompts wait for the next batch; the speed of two cores grows little "
    "beyond 16",
)
COLUMNS = limit(
    32_768,
    "tokens of one batch, with padding, at most",
    "the memory of keys and values; further prompts wait for the next batch",
)


class Batch:
    """Answers requests until all are complete. Use it while holding the model, which must not change meanwhile."""

    def __init__(self, lm: LM, state: str = "") -> None:
        self._lm, self._state = lm, state
        alone = (
            not decodes_together(lm) or lm.speaker is not lm.local
        )  # another engine has no joint batch here
        self._decoder = None if alone else Decoder(lm)
        self._started: list[Started] = []
        self.begun = False  # something has been started

    @property
    def running(self) -> bool:
        """True while there are requests that have begun and are not complete."""
        return bool(self._started)

    @property
    def _room(self) -> int:
        """How many more questions the batch has room for."""
        return ROWS - sum(len(s.rows) + len(s.waiting) for s in self._started)

    @property
    def requests(self) -> list[Request]:
        """Those that have begun and are not complete."""
        return [started.request for started in self._started]

    def run(
        self, more: Callable[[int], Iterable[Request]], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Answer the requests that `more` returns, until it returns none and all are answered.

        It is called before every token with the number of questions there is room for, so that requests can join.
        Where `is_over` says so after a token, it returns before the end, and `run` goes on from there when it is called
        again: others may use the model meanwhile. The failure of one request ends that one; a failure of the joint
        batch ends all that are in it.
        """
        while True:
            for request in more(self._room) if self._room > 0 else ():
                self.begun = True
                self._try(request, self._start)
            self._remember()
            self._let_go()
            if not self._started:
                return
            try:
                self._step()
            except Exception as error:
                self._fail(error)
                return
            for started in list(self._started):
                self._tell(started)
            if is_over():
                self._let_go()
                return

    def _try(self, request: Request, work: Callable[[Request], None]) -> None:
        try:
            request.ctx.check()
            work(request)
        except BaseException as error:
            self._settle(request, error)
            if not isinstance(error, Exception):
                raise

    def _start(self, request: Request) -> None:
        started = Started(request)
        for ids, top in request.reads:
            request.ctx.check()
            started.reads.append(self._lm.local.read(ids, top))
        prompts = [question.prompt for question in request.questions]
        claims = self._lm.routes.claims(prompts) if self._lm.routes.acting else [None] * len(prompts)
        for i, claim in enumerate(claims):
            if claim is not None:
                started.claimed[i] = claim
            elif self._decoder is None:
                started.done[i] = self._plain(request, request.questions[i])
            else:
                started.waiting.append(i)
        started.score(self._lm, self._decoder)
        self._started.append(started)

    def _remember(self) -> None:
        """Let memories answer the questions they claim, in one batch for all requests that have just begun."""
        groups: dict[Hashable, list[tuple[Started, int]]] = {}
        for started in self._started:
            for i, (route, _) in started.claimed.items():
                asked = started.request.questions[i]
                # A repeatable sample must not depend on who else asks.
                alone = (id(started), i) if asked.temperature and asked.seed is not None else None
                alike = (speaker_of(route), asked.temperature, asked.top_p, alone)
                groups.setdefault(alike, []).append((started, i))
        for group in groups.values():
            for at in range(0, len(group), ROWS):
                try:
                    self._remembered(group[at : at + ROWS])
                except Exception as error:
                    self._fail(error, [started for started, _ in group[at : at + ROWS]])
        for started in self._started:
            started.claimed = {}

    def _remembered(self, group: Sequence[tuple[Started, int]]) -> None:
        """Answer questions that one memory claims, or several that answer alike. It may change the model."""
        mine = [(started, i) for started, i in group if not started.request.gone and started in self._started]
        if not mine:
            return
        claims = [started.claimed[i] for started, i in mine]
        asked = [started.request.questions[i] for started, i in mine]

        def check() -> None:
            if all(started.request.gone for started, _ in mine):
                raise Cancelled("cancelled; nothing was changed")

        local, first = self._lm.local, asked[0]
        quiet = self._lm.routes.off()
        with (
            quiet,
            claims[0][0].answering(self._lm) as speaker,
            local.checking(check),
            local.nucleus(first.top_p),
        ):
            said = speaker.generate(
                [claim.prompt for _, claim in claims],
                [question.max_new_tokens for question in asked],
                temperature=first.temperature,
                seed=first.seed,
            )
        for (started, i), (_, claim), question, one in zip(mine, claims, asked, said, strict=True):
            started.done[i] = replace(_ended(one, question), claim=claim)

    def _plain(self, request: Request, question: Continuation) -> Generation:
        with self._lm.routes.off():
            return self._alone(self._lm, request, question)

    def _alone(self, speaker: Speaker, request: Request, question: Continuation) -> Generation:
        """One answer outside the joint batch; it stops when the client is gone."""
        with self._lm.local.checking(request.ctx.check), self._lm.local.nucleus(question.top_p):
            (said,) = speaker.generate(
                [question.prompt],
                question.max_new_tokens,
                temperature=question.temperature,
                seed=question.seed,
            )
        return _ended(said, question)

    def _let_go(self) -> None:
        """Finish the requests that are complete, and drop those whose client is gone."""
        for started in list(self._started):
            if started.request.gone:
                if self._decoder is not None:
                    self._decoder.drop([row for row in started.rows.values() if row in self._decoder.rows])
                self._settle(started.request, Cancelled("cancelled; nothing was changed"))
                self._started.remove(started)
            elif started.complete:
                said = [started.done[i] for i in range(len(started.request.questions))]
                scores = [started.scores[i] for i in range(len(started.request.pairs))]
                self._settle(started.request, Answers(said, scores, started.reads, self._state))
                self._started.remove(started)

    def _step(self) -> None:
        if self._decoder is None:
            return
        if self._decoder.rows:
            self._decoder.step()
        self._decoder.add(list(self._next_rows()))
        for started in self._started:
            for i, row in list(started.rows.items()):
                self._after_token(started, i, row)

    def _after_token(self, started: Started, i: int, row: DecodedRow) -> None:
        question = started.request.questions[i]
        if started.request.on_token is not None:
            started.request.on_token(i, row.new, row.told)
        text = self._text(row.new) if question.stop or question.until else ""
        ended = cut(text, question.stop) if question.stop else None
        enough = question.until is not None and question.until(text)
        if ended is not None or enough or row.finished or row.full:
            if self._decoder is not None and row in self._decoder.rows:
                self._decoder.drop([row])
            started.end(i, self._said(row, ended))

    def _next_rows(self) -> Iterable[DecodedRow]:
        """Waiting questions as rows, one of each request in turn, as far as there is room."""
        assert self._decoder is not None
        rows, width = len(self._decoder.rows), max([0, *(r.most + len(r.prompt) for r in self._decoder.rows)])
        while any(started.waiting for started in self._started):
            for started in sorted(self._started, key=lambda s: len(s.rows)):
                if not started.waiting:
                    continue
                question = started.request.questions[started.waiting[0]]
                ids = self._lm.encode(question.prompt)[0]
                width = max(width, len(ids) + question.max_new_tokens)
                if rows and (rows >= ROWS or (rows + 1) * width > COLUMNS):
                    return
                row = DecodedRow(
                    ids,
                    question.max_new_tokens,
                    question.temperature,
                    question.seed,
                    question.top_p,
                    question.logprobs,
                    started.answers_of(self._lm, started.waiting[0]),
                )
                started.rows[started.waiting.pop(0)] = row
                rows += 1
                yield row

    def _said(self, row: DecodedRow, ended: str | None) -> Generation:
        """The row's text, which a stop string may have `ended`, with the probabilities of the tokens in it."""
        told = None
        if row.logprobs is not None:
            kept = len(row.new) if ended is None else self._tokens_of(row.new, ended)
            told = tuple(row.told[:kept])
        text = self._text(row.new) if ended is None else ended
        return Generation(text, len(row.new), row.finished or ended is not None, logprobs=told)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._lm.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _tokens_of(self, ids: Sequence[int], text: str) -> int:
        """How many of the tokens are needed for a text that is the beginning of theirs."""
        return next((n for n in range(len(ids)) if len(self._text(ids[:n])) >= len(text)), len(ids))

    def _tell(self, started: Started) -> None:
        """Report progress: the share of the most tokens that the request can have."""
        questions = started.request.questions
        most = sum(question.max_new_tokens for question in questions)
        have = sum(questions[i].max_new_tokens for i in started.done)
        have += sum(len(row.new) for row in started.rows.values())
        if most and have != started.said:
            started.said = have
            n = len(started.request.pairs)
            words = (
                f"{have} of at most {most} tokens"
                if len(questions) == 1
                else (f"{len(started.done)} of {len(questions)} answers")
            )
            started.request.ctx.progress(n + have / most * len(questions), n + len(questions), words)

    def _fail(self, error: Exception, failed: Sequence[Started] | None = None) -> None:
        """End the requests that failed together, all of them by default."""
        failed = self._started if failed is None else failed
        if not isinstance(error, Cancelled):
            log.error("a batch of %d requests failed", len(failed), exc_info=error)
        for started in failed:
            self._settle(started.request, error)
        self._started = [started for started in self._started if started not in failed]

    def _settle(self, request: Request, result: Answers | BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled in this moment
            if isinstance(result, BaseException):
                request.answer.set_exception(result)
            else:
                request.answer.set_result(result)


def _ended(said: Generation, question: Continuation) -> Generation:
    """A text, cut before the first stop string."""
    ended = cut(said.text, question.stop)
    return said if ended is None else replace(said, text=ended, finished=True)


def run_alone(lm: LM, request: Request, state: str = "") -> Answers:
    """Answer one request in the calling thread, which holds the model."""
    batch = Batch(lm, state)
    batch.run(lambda _: () if batch.begun else (request,))
    return request.answer.result()
