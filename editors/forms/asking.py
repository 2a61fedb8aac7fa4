"""Ask many short questions at once, and go on only with those whose first word the model is sure of.

Reading a prompt costs most of a short answer. So the prompts are read once, and only the kept ones are answered, from
the state that reading left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.model.beginnings import read_beginnings
from editors.model.caches import generate, keep_rows, kept_of
from editors.model.lm import LM, Prompt
from editors.scoring.words import normalise, short_answer

TOKENS = 4  # of an answer, the first one among them
_BREAKS = re.compile(
    r"\s(and|or|with|which|that|who|where|when|while|but|is|was|are|were|has|had|in|on|at|as|since|because|located)\b",
    re.IGNORECASE,
)
_ENDED = re.compile(r"[.,;:!?()\[\]\"“”\n。，；：！？]|\s[-–—]\s")


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt."""

    text: str  # the greedy continuation, a few tokens
    fact: str  # the words at its beginning that are the answer; "" if they do not end within the tokens
    probability: (
        float  # of the tokens that make up `fact`, one after another; of the first token where it is ""
    )


class Reading:
    """Prompts that were read, ready to be answered. Prompts go to the model's own weights, past its memories."""

    @torch.no_grad()
    def __init__(self, lm: LM, prompts: Sequence[Prompt]) -> None:
        self._lm = lm
        rows = [lm.encode(prompt)[0] for prompt in prompts]
        lm.local.check()
        begun = read_beginnings(lm, rows, TOKENS)
        if begun is not None:
            self._ids, self._mask = begun.ids, begun.mask
            out = self._generate(self._ids, self._mask, 1, past_key_values=begun.past)
        else:
            self._ids, self._mask = lm.pad_before_answers(rows)
            out = self._generate(self._ids, self._mask, 1)
        self._past = kept_of(lm, out)
        self.logprobs: Tensor = out.logits[0].float().log_softmax(-1)  # (n, vocabulary) of the first token
        best = self.logprobs.max(-1)
        self.first: list[int] = best.indices.tolist()
        self.sure: list[float] = best.values.exp().tolist()  # probability of the first token

    def first_word(self, i: int) -> str:
        """The first token of an answer as text, without spaces."""
        text: str = self._lm.tokenizer.decode([self.first[i]])
        return text.strip()

    @torch.no_grad()
    def answers(self, kept: Sequence[int]) -> dict[int, Answer]:
        """The greedy answers of some prompts, by their indices."""
        if not kept:
            return {}
        rows = torch.tensor(kept, device=self._ids.device)
        ids, mask = self._ids[rows], self._mask[rows]
        if self._past is None:
            out = self._generate(ids, mask, TOKENS)
            steps, tokens = list(out.logits), out.sequences[:, 1:]
        else:
            first = torch.tensor([[self.first[i]] for i in kept], device=ids.device)
            keep_rows(self._past, kept)
            ids, mask = torch.cat([ids, first], 1), torch.cat([mask, torch.ones_like(first)], 1)
            out = self._generate(ids, mask, TOKENS - 1, past_key_values=self._past)
            steps = [self.logprobs[rows], *out.logits]
            tokens = torch.cat([first, out.sequences[:, ids.shape[1] :]], 1)
            self._past = None
        logp = torch.stack([step.float().log_softmax(-1) for step in steps], 1)  # (kept, tokens, vocabulary)
        picked = logp.gather(-1, tokens[:, : logp.shape[1], None])[..., 0]
        return {i: self._answer(tokens[k].tolist(), picked[k].tolist()) for k, i in enumerate(kept)}

    def _answer(self, tokens: Sequence[int], logprobs: Sequence[float]) -> Answer:
        ends = self._lm.local.end_ids()
        stop = next((n for n, token in enumerate(tokens) if token in ends), None)
        text = self._text(tokens[:stop])
        fact = fact_of(text, ended=stop is not None)
        count = next((n for n in range(1, len(tokens) + 1) if fact and fact in self._text(tokens[:n])), 1)
        return Answer(text, fact, float(torch.tensor(logprobs[:count]).sum().exp()))

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._lm.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _generate(self, ids: Tensor, mask: Tensor, tokens: int, **more: Any) -> Any:
        lm = self._lm

        def goes_on(now: Tensor, _: Any) -> Tensor:
            lm.local.check()  # raises when the client is gone
            return torch.zeros(len(now), dtype=torch.bool, device=now.device)

        lm.local.check()
        with lm.unrouted(), lm.local.ending_at([ids.shape[1] - 1] * len(ids)):
            return generate(
                lm,
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                pad_token_id=lm.pad_id,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                return_dict_in_generate=True,
                output_logits=True,
                stopping_criteria=[goes_on],
                **more,
            )


def fact_of(text: str, ended: bool = False) -> str:
    """The words at the beginning of a continuation that are its answer, or "" where their end is not seen.

    They end at a mark or at a word such as "and" or "which". `ended`: the model stopped after the text. Without any
    end the last word may be a part of one and is left out.
    """
    text = text.strip()
    clause = short_answer(text)
    cut = _BREAKS.search(clause)
    if cut:
        return clause[: cut.start()].strip()
    if ended or _ENDED.search(text):
        return clause
    return " ".join(clause.split()[:-1])


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same words, or one begins with the other."""
    one, other = normalise(one), normalise(other)
    shorter, longer = sorted((one, other), key=len)
    return bool(shorter) and re.match(rf"{re.escape(shorter)}(?!\w)", longer) is not None
