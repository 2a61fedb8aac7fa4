"""Answers as streams of server-sent events, a token at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from editors.model.lm import LM, Generation, TokenLogprob
from server.answering.request import Answers, Request
from server.answering.service import AnswerService
from server.answering.stopping import shown
from server.openai.answering import Shape
from server.openai.asking import Asked
from server.openai.errors import as_api_error
from server.request_context import RequestContext

QUIET = 10.0
"""Seconds without a token after which a comment is sent, so that no proxy closes the stream."""

Token = tuple[int, list[int], list[TokenLogprob]]


class _Growing:
    """The text of one choice, and how much of it was sent."""

    def __init__(self) -> None:
        self.sent, self.told = "", 0
        self.begun = False

    def more(self, text: str) -> str:
        """The text added since the last call; empty if a decoder changed what it wrote before."""
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


class Stream:
    """One request whose answer is streamed. Submitting it raises what AnswerService.submit raises."""

    def __init__(self, lm: LM, answers: AnswerService, asked: Asked, ctx: RequestContext) -> None:
        self._lm, self._asked, self._shape = lm, asked, Shape(lm, asked)
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[Token | None] = asyncio.Queue()
        self._texts = [_Growing() for _ in range(len(asked.prompts) * asked.body.n)]
        self._request = asked.request(ctx, self._on_token)
        self._ctx = ctx
        answers.submit(self._request)
        self._request.answer.add_done_callback(lambda _: self._put(None))

    def _on_token(self, i: int, ids: Sequence[int], told: Sequence[TokenLogprob]) -> None:
        self._put((i, list(ids), list(told)))

    def _put(self, token: Token | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is stopping
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)

    async def events(self) -> AsyncIterator[bytes]:
        """The events, as they go over the line. Leaving the iteration withdraws the request."""
        try:
            if self._asked.echo:
                for i in range(len(self._texts)):
                    yield _event(self._shape.chunk(i, self._prompt(i), first=True))
            while (token := await self._next()) is not None:
                if isinstance(token, bytes):
                    yield token
                elif (chunk := self._chunk(*token)) is not None:
                    yield _event(chunk)
            for event in self._ending(self._request):
                yield event
            yield b"data: [DONE]\n\n"
        finally:
            self._ctx.cancelled.set()
            self._request.answer.cancel()

    async def _next(self) -> Token | bytes | None:
        try:
            return await asyncio.wait_for(self._tokens.get(), QUIET)
        except TimeoutError:
            return b": waiting\n\n"

    def _prompt(self, i: int) -> str:
        return self._asked.prompts[i // self._asked.body.n].text

    def _chunk(self, i: int, ids: list[int], told: list[TokenLogprob]) -> dict[str, Any] | None:
        text = self._lm.tokenizer.decode(ids, skip_special_tokens=True)
        return self._piece(i, shown(text, self._asked.body.stop), told)

    def _piece(self, i: int, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """What is new of choice i; None when nothing is."""
        growing = self._texts[i]
        offset, new = len(growing.sent), growing.more(text)
        if not new:
            return None
        if self._asked.echo:
            offset += len(self._prompt(i))
        chunk = self._shape.chunk(
            i, new, first=not growing.begun, told=told, begin=growing.told, offset=offset
        )
        growing.begun, growing.told = True, len(told)
        return chunk

    def _ending(self, request: Request) -> list[bytes]:
        """The rest of every text and why it ended; or the error that ended all."""
        try:
            answers: Answers = request.answer.result()
        except BaseException as error:
            return [_event(as_api_error(error).body)]
        events = []
        said = answers.generations or [Generation("", 0, False) for _ in self._texts]
        for i, one in enumerate(said):
            if (piece := self._piece(i, one.text, one.logprobs or ())) is not None:
                events.append(_event(piece))
            events.append(_event(self._shape.last_chunk(i, one, answers.state)))
        if self._asked.body.with_usage:
            events.append(_event(self._shape.usage_chunk(answers)))
        return events


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
