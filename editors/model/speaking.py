"""What a model says: scores of answers and continuations of prompts.

`Speaker` is the protocol. `LocalSpeaker` runs the loaded model; another engine could satisfy it too. `Routes` puts
memories in front of a speaker: a prompt in the scope of one is answered by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from editors.model.answer_inputs import answer_inputs, final_states
from editors.model.caches import generate
from editors.model.decoding import decodes_together
from editors.model.greedy import continued
from editors.model.said import (
    COLDEST,
    Generation,
    Score,
    TokenLogprob,
    Until,
    token_logprob,
)
from editors.model.spoken_model import SpokenModel
from editors.model.text import Prompt

T = TypeVar("T")


def _go_on() -> None:
    return None


def _keep(in_text: bool) -> None:
    return None


READ_TOKENS = 256
"""Tokens whose probabilities over the whole vocabulary are held at once."""


def lengths_of(count: int, max_new_tokens: int | Sequence[int]) -> list[int]:
    """The length of each of `count` texts, from one number for all or one for each."""
    return [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)


class Speaker(Protocol):
    """Something that scores answers and continues prompts."""

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Probability and rank of answers after prompts."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        until: Until | None = None,
    ) -> list[Generation]:
        """Continuations (a leading space is kept), greedy unless temperature > 0.

        `max_new_tokens` is one number, or one for each prompt. `until` may end a text earlier; a speaker may ignore
        it. Texts of several lengths in one call cost as many passes as the longest.
        """


class LocalSpeaker:
    """Runs the loaded model, in batches of similar length."""

    def __init__(self, lm: SpokenModel) -> None:
        self.lm = lm
        self.prompt_ends: Sequence[int] | None = None
        """Per row of the running batch the column of its prompt's last token, for what acts on answers only."""
        self._check: Callable[[], None] = _go_on
        self._between: Callable[[bool], None] = _keep
        self._top_p: float | None = None

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        rows = [(self.lm.encode(p)[0], self.lm.answer_ids(p, answer)) for p, answer in pairs]
        scores: dict[int, Score] = {}
        for batch in self.lm.buckets([len(p) + len(a) for p, a in rows]):
            self._check_in(False)
            for i, logits in zip(batch, self.answer_logits([rows[i] for i in batch]), strict=True):
                answer = torch.tensor(rows[i][1], device=logits.device)
                logp = logits.float().log_softmax(-1)
                picked = logp.gather(-1, answer[:, None])[:, 0]
                rank = int((logp[0] > picked[0]).sum())
                scores[i] = Score(float(picked.sum()), len(rows[i][1]), rank)
        return [scores[i] for i in range(len(rows))]

    @torch.no_grad()
    def read(self, ids: Sequence[int], top: int) -> list[TokenLogprob]:
        """How probable each token of a text is after those before it, with the `top` most probable ones there.

        The first token follows nothing, so the result has one entry less than `ids`. Of a decoder-only model.
        """
        if len(ids) < 2:
            return []
        inputs = answer_inputs(self.lm, [(ids[:1], ids[1:])])
        hidden = final_states(self.lm, inputs)[0, :-1]
        told: list[TokenLogprob] = []
        for start in range(0, len(hidden), READ_TOKENS):
            self._check()
            logp = self.lm.head(hidden[start : start + READ_TOKENS]).float().log_softmax(-1)
            told += [token_logprob(row, ids[start + i + 1], top) for i, row in enumerate(logp)]
        return told

    @contextmanager
    def nucleus(self, top_p: float) -> Iterator[None]:
        """In this block, what is sampled is sampled from the most probable tokens that share `top_p` in all."""
        before, self._top_p = self._top_p, top_p if top_p < 1 else None
        try:
            yield
        finally:
            self._top_p = before

    def answer_logits(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
        """For each (prompt ids, answer ids): logits (answer, vocabulary) that predict the answer's tokens."""
        inputs = answer_inputs(self.lm, [(prompt, answer[:-1]) for prompt, answer in rows])
        with self.ending_at(inputs.first):
            hidden = final_states(self.lm, inputs)
        for i, (_, answer) in enumerate(rows):
            yield self.lm.head(hidden[i, inputs.predicting(i, len(answer))])

    def check(self) -> None:
        """Call the `check` of the present `checking` block, which raises if the work is to end."""
        self._check()

    @contextmanager
    def checking(self, check: Callable[[], None], between: Callable[[bool], None] = _keep) -> Iterator[None]:
        """Call `check` before every batch of scores and every token in this block; what it raises ends them.

        `between` is called there too and may use the model itself. It is told whether that is in the middle of texts,
        where hooks may hold something for the next token.
        """
        before = self._check, self._between
        self._check, self._between = check, between
        try:
            yield
        finally:
            self._check, self._between = before

    @contextmanager
    def ending_at(self, ends: Sequence[int]) -> Iterator[None]:
        """Note where the prompts of the running batch end."""
        before, self.prompt_ends = self.prompt_ends, ends
        try:
            yield
        finally:
            self.prompt_ends = before

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        until: Until | None = None,
        answers: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Generation]:
        """As Speaker.generate. `answers` to some of the prompts, by index, may be scored where these are read."""
        rows = [self.lm.encode(p)[0] for p in prompts]
        lengths = lengths_of(len(rows), max_new_tokens)
        if temperature <= 0 and decodes_together(self.lm):
            scored = {
                i: [self.lm.answer_ids(prompts[i], answer) for answer in each]
                for i, each in (answers or {}).items()
            }
            return continued(self.lm, rows, lengths, until, scored, self._check_in)
        done: dict[int, Generation] = {}
        for batch in self.lm.buckets([len(r) for r in rows], lengths):
            self._check_in(False)
            done |= self._generated(batch, rows, lengths, temperature, seed, until)
        return [done[i] for i in range(len(rows))]

    def _generated(
        self,
        batch: Sequence[int],
        rows: Sequence[list[int]],
        lengths: Sequence[int],
        temperature: float,
        seed: int | None,
        until: Until | None,
    ) -> dict[int, Generation]:
        """The continuations of the rows of one batch, by their index."""
        lm, ends = self.lm, self.end_ids()
        ids, mask = lm.pad_before_answers([rows[i] for i in batch])
        last = lm.answer_column(range(ids.shape[1]))
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": max(temperature, COLDEST), "top_p": self._top_p}
        forked = torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else [])
        stops = _Stops(lm, batch, [lengths[i] for i in batch], last + 1, until, self._check_in)
        with forked, self.ending_at([last] * len(batch)):
            if temperature > 0:
                torch.manual_seed(seed if seed is not None else torch.seed())
            out = generate(
                lm,
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(stops.lengths),
                pad_token_id=lm.pad_id,
                eos_token_id=sorted(ends) or None,
                top_k=None,
                stopping_criteria=[stops],
                **sampling,
            )
        new = zip(batch, out[:, last + 1 :].tolist(), stops.lengths, strict=True)
        return {i: self._generation(row[:n], ends) for i, row, n in new}

    def _check_in(self, in_text: bool = True) -> None:
        self._check()
        self._between(in_text)

    def _generation(self, row: list[int], ends: set[int]) -> Generation:
        """New ids, cut at the first end-of-text token."""
        stop = next((n for n, token in enumerate(row) if token in ends), None)
        ids = row if stop is None else row[:stop]
        text: str = self.lm.tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(text, len(ids), stop is not None)

    def end_ids(self) -> set[int]:
        """The tokens that end a text."""
        config_end = self.lm.model.generation_config.eos_token_id
        ends = config_end if isinstance(config_end, list) else [config_end]
        return {e for e in (*ends, self.lm.tokenizer.eos_token_id) if e is not None}


class _Stops:
    """A criterion of transformers' `generate`: ends each text of a batch at its own length, or earlier.

    `lengths` are, after the run, the tokens that were wanted of each text. `check` is called after every token; what
    it raises ends the run.
    """

    def __init__(
        self,
        lm: SpokenModel,
        indices: Sequence[int],
        lengths: Sequence[int],
        start: int,
        until: Until | None,
        check: Callable[[], None],
    ) -> None:
        self.lengths = list(lengths)
        self._lm, self._indices, self._start = lm, indices, start
        self._until, self._check = until, check

    def __call__(self, ids: Tensor, _scores: Any) -> Tensor:
        self._check()
        count = ids.shape[1] - self._start
        if self._until is not None:
            self._end_early(ids, count, self._until)
        return torch.tensor([count >= length for length in self.lengths], device=ids.device)

    def _end_early(self, ids: Tensor, count: int, until: Until) -> None:
        for row, index in enumerate(self._indices):
            if count < self.lengths[row]:
                text = self._lm.tokenizer.decode(ids[row, self._start :].tolist(), skip_special_tokens=True)
                if until(index, text):
                    self.lengths[row] = count
