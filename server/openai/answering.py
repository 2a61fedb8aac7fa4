"""The model's answers in the form of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from editors.model.lm import LM, Generation, TokenLogprob
from server.answering.request import Answers
from server.openai.asking import Asked
from server.openai.bodies import ChatBody, Steer
from server.transaction.stack import digest

CONTEXT = 4
"""Tokens before one with which its text is found."""


class Shape:
    """Shapes the answer to one request: whole, or as the chunks of a stream."""

    def __init__(self, lm: LM, asked: Asked) -> None:
        self._lm, self._asked = lm, asked
        self.chat = isinstance(asked.body, ChatBody)
        self._id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._special = frozenset(lm.tokenizer.all_special_tokens)  # are not part of the text

    def _head(self, kind: str, state: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.body.model,
            "system_fingerprint": self._fingerprint(state) if state else None,
        }

    def _fingerprint(self, state: str) -> str:
        """Names the model's state, and the steering of this request where there is some."""
        steered = "".join(one.blob for one in self._asked.steering)
        return f"errata-{state[:16]}" + (f"-{digest(steered.encode())[:8]}" if steered else "")

    # --- whole ---------------------------------------------------------------------------------

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        said = answers.generations or [Generation("", 0, False) for _ in self._asked.prompts]
        choices = [self._choice(i, one, answers) for i, one in enumerate(said)]
        return {
            **self._head(kind, answers.state),
            "choices": choices,
            "usage": self.usage(answers),
            "errata": self.extras(answers),
        }

    def _choice(self, i: int, said: Generation, answers: Answers) -> dict[str, Any]:
        choice = {"index": i, "finish_reason": finish(said)}
        if self.chat:
            message = {"role": "assistant", "content": said.text, "refusal": None}
            told = None if said.logprobs is None else self.chat_logprobs(said.logprobs)
            return choice | {"message": message, "logprobs": told}
        n = i // self._asked.body.n
        echoed = self._asked.prompts[n].text if self._asked.echo else ""
        told = None
        if said.logprobs is not None or (answers.reads and said.claim is None):
            read = answers.reads[n] if answers.reads else []
            first = self._asked.ids[n][0] if answers.reads else None
            told = self.completion_logprobs([*read, *(said.logprobs or ())], first)
        return choice | {"text": echoed + said.text, "logprobs": told}

    def usage(self, answers: Answers) -> dict[str, int]:
        """How many tokens were read and written."""
        read = sum(map(len, self._asked.ids))
        written = sum(said.tokens for said in answers.generations)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def extras(self, answers: Answers) -> dict[str, Any]:
        """Errata's own fields: the state that answered, and the memories that answered instead of the model."""
        memories = [said.claim.entry if said.claim else None for said in answers.generations]
        steering = self._asked.body.steering
        told = {one.name: _told(steering[one.name]) for one in self._asked.steering}
        return {"state_hash": answers.state, "memories": memories, "steering": told}

    # --- chunks --------------------------------------------------------------------------------

    def chunk(
        self,
        i: int,
        text: str,
        *,
        first: bool,
        told: Sequence[TokenLogprob] = (),
        begin: int = 0,
        offset: int = 0,
    ) -> dict[str, Any]:
        """A piece of the text of choice i, which stands at the character `offset` of the answer.

        The probabilities in `told` are of all its tokens so far; those from number `begin` on are this piece's.
        """
        choice: dict[str, Any] = {"index": i, "finish_reason": None}
        if self.chat:
            delta = {"role": "assistant", "content": text} if first else {"content": text}
            choice |= {"delta": delta, "logprobs": self.chat_logprobs(told, begin) if told else None}
        else:
            told_of = self.completion_logprobs(told, None, begin, offset) if told else None
            choice |= {"text": text, "logprobs": told_of}
        return self._chunk_of([choice])

    def last_chunk(self, i: int, said: Generation, state: str) -> dict[str, Any]:
        """The end of choice i."""
        text: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {"index": i, "finish_reason": finish(said), "logprobs": None, **text}
        return self._chunk_of([choice], state)

    def usage_chunk(self, answers: Answers) -> dict[str, Any]:
        """The chunk after the last, with the number of tokens."""
        more = {"usage": self.usage(answers), "errata": self.extras(answers)}
        return self._chunk_of([], answers.state) | more

    def _chunk_of(self, choices: list[dict[str, Any]], state: str = "") -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind, state), "choices": choices}

    # --- probabilities -------------------------------------------------------------------------

    def chat_logprobs(self, told: Sequence[TokenLogprob], begin: int = 0) -> dict[str, Any]:
        """In the form of /v1/chat/completions, for the tokens from number `begin` on."""
        content = []
        for n, one in enumerate(told[begin:], begin):
            before = [t.id for t in told[max(0, n - CONTEXT) : n]]
            own = self._token(before, one.id, one.logprob)
            content.append(own | {"top_logprobs": [self._token(before, *other) for other in one.top]})
        return {"content": content, "refusal": None}

    def completion_logprobs(
        self, told: Sequence[TokenLogprob], first: int | None, begin: int = 0, offset: int = 0
    ) -> dict[str, Any]:
        """In the form of /v1/completions, for the tokens from number `begin` on.

        `first`: a token before them that follows nothing. `offset`: the character that they begin at.
        """
        texts: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        if first is not None:
            texts, values, tops = [self._text((), first)], [None], [None]
        ids = ([] if first is None else [first]) + [one.id for one in told]
        skipped = len(ids) - len(told)
        for n, one in enumerate(told[begin:], begin + skipped):
            before = ids[max(0, n - CONTEXT) : n]
            texts.append(self._text(before, one.id))
            values.append(one.logprob)
            tops.append({self._text(before, token): value for token, value in reversed(one.top)})
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += 0 if text in self._special else len(text)
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _token(self, before: Sequence[int], token: int, logprob: float) -> dict[str, Any]:
        text = self._text(before, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, before: Sequence[int], token: int) -> str:
        """A token's text after others: some tokenizers write no space before a token that stands alone."""
        decode = self._lm.tokenizer.decode
        text: str = decode([*before, token])
        ahead: str = decode(before) if before else ""
        return text[len(ahead) :] if text.startswith(ahead) else str(decode([token]))


def finish(said: Generation) -> str:
    """Why a text ended."""
    return "stop" if said.finished else "length"


def _told(steer: Steer) -> float | dict[str, Any]:
    """A dose as it was asked for: a number, or with its other options where there are some."""
    options: dict[str, Any] = steer.model_dump(mode="json", exclude_defaults=True)
    return steer.dose if set(options) <= {"dose"} else {"dose": steer.dose, **options}
