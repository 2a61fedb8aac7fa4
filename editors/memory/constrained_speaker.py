"""Answers that must say a remembered fact: decoding with constraints (DeepEdit; Wang et al. 2024, arXiv 2401.10471).

The paper checks each step of reasoning against the memory and decodes again what contradicts it. Here the model answers
with the fact in front of the prompt. Where its answer does not say the fact, it is made to begin with it and goes on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from editors.constants import assumed
from editors.edit import is_question
from editors.model.lm import LM, Generation, Prompt, Score, separator_after
from editors.scoring import says

DOUBT = assumed(
    0.01,
    "probability that a memory leaves to all answers but its own",
    "an answer that is constrained is certain; a little is left, so that logarithms stay finite",
)
# One demonstration, then the fact: small models copy better after an example.
PLAIN = (
    "New fact: The patron of Elmstead is Mr Brown.\nPrompt: Elmstead has as its patron Mr Brown.\n\n"
    "New fact: {facts}\nPrompt: "
)
CHAT = "Take this as true: {facts} "
INSIDE_ANSWER = "{facts} "
_ENDS = re.compile(r"[.!?](?=\s|$)|[。！？]|\n")


@dataclass(frozen=True)
class RememberedFact:
    """One remembered fact."""

    subject: str
    prompt: str
    target: str
    also: tuple[str, ...] = ()  # names of the subject in other languages
    wordings: tuple[str, ...] = ()  # other sentences that say the fact

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the subject."""
        return (self.subject, *self.also)

    @property
    def opening(self) -> str:
        """The beginning of an answer, up to the target: the prompt, or nothing where that is a question."""
        return "" if is_question(self.prompt) else self.prompt

    @property
    def end(self) -> str:
        """What ends a sentence after the target."""
        return "" if self.target.endswith((".", "!", "?")) else "."

    @property
    def sentence(self) -> str:
        return f"{self.prompt} {self.target}{self.end}"


@dataclass(frozen=True)
class FactPrompt(Prompt):
    """A prompt with facts in front, which remembers what was asked."""

    facts: tuple[RememberedFact, ...]
    own: Prompt  # without the facts
    asked: str  # the user's own text
    replies: bool  # the model answers freely, so that the fact may stand anywhere in its answer

    def says_fact(self, answer: str) -> bool:
        """Whether an answer says the first fact, which is the nearest."""
        return says(answer, self.facts[0].target, anywhere=self.replies, question=self.asked)

    def opened(self) -> str:
        """The beginning of an answer that says the fact."""
        fact = self.facts[0]
        opening = f"{fact.opening}{separator_after(fact.opening)}" if self.replies else ""
        return f"{self.separator}{opening}{fact.target}{fact.end}"


def in_front(lm: LM, prompt: Prompt, facts: Sequence[RememberedFact]) -> FactPrompt:
    """The prompt with facts before the user's text, inside the chat template where there is one."""
    asked = lm.user_text(prompt)
    replies = prompt.chat and (lm.is_seq2seq or prompt.text[prompt.offset :] != asked)
    # The nearest fact comes last, right before the text it is about.
    told = " ".join(s for f in reversed(facts) for s in (*f.wordings, f.sentence))
    template = CHAT if replies else INSIDE_ANSWER if prompt.chat else PLAIN
    before = template.format(facts=told)
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    offset = prompt.offset + len(before) if prompt.offset else 0
    return FactPrompt(text, prompt.chat, offset, prompt.separator, tuple(facts), prompt, asked, replies)


class FactSpeaker:
    """The model, with facts in front of each prompt.

    After a statement they are there for its first sentence only: a small model goes on about what stands before the
    prompt ("New fact: ..."), so that what follows is written without it.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Probability and rank of answers after prompts."""
        return self.lm.score(pairs)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Continuations of prompts that `in_front` made."""
        asked = [p for p in prompts if isinstance(p, FactPrompt)]
        said = self.lm.generate(asked, max_new_tokens, temperature=temperature, seed=seed)
        results = []
        for prompt, answer in zip(asked, said, strict=True):
            begun = None if prompt.replies else self.beginning(prompt, answer.text)
            if begun is None or begun == answer.text:
                results.append(answer)
            else:
                results.append(self._going_on(prompt, begun, max_new_tokens, temperature, seed))
        return results

    def beginning(self, prompt: FactPrompt, answer: str) -> str | None:
        """What is kept of an answer to a statement, for the model to go on from: its first sentence."""
        ends = [m.end() for m in _ENDS.finditer(answer)]
        says_it = prompt.says_fact(answer)
        return next((answer[:e].rstrip() for e in ends if prompt.says_fact(answer[:e]) == says_it), answer)

    def _going_on(
        self, prompt: FactPrompt, begun: str, most: int, temperature: float, seed: int | None
    ) -> Generation:
        """The beginning of an answer, and what the model goes on with."""
        if self.lm.is_seq2seq:  # the answer is no continuation of the prompt
            return Generation(begun, len(self.lm.answer_ids(prompt, begun)), finished=True)
        ids = self.lm.tokenizer(begun, add_special_tokens=False)["input_ids"]
        if len(ids) >= most:
            text: str = self.lm.tokenizer.decode(ids[:most], skip_special_tokens=True)
            return Generation(text, most, finished=False)
        own = prompt if prompt.replies else prompt.own
        after = replace(own, text=own.text + begun, separator=separator_after(begun))
        (rest,) = self.lm.generate([after], most - len(ids), temperature=temperature, seed=seed)
        if prompt.says_fact(begun) and not prompt.says_fact(begun + rest.text):
            # it would take the answer back, make its last word longer, or only repeat itself
            return Generation(begun, len(ids), finished=True)
        return Generation(begun + rest.text, len(ids) + rest.tokens, rest.finished)


class ConstrainedSpeaker(FactSpeaker):
    """The model, held to the remembered fact of each prompt."""

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The fact has the probability 1 - DOUBT, every other answer DOUBT times the model's own."""
        own = super().score(pairs)
        return [self._scored(prompt, answer, s) for (prompt, answer), s in zip(pairs, own, strict=True)]

    def _scored(self, prompt: Prompt, answer: str, own: Score) -> Score:
        assert isinstance(prompt, FactPrompt)
        target = prompt.facts[0].target
        if not says(answer, target):
            return Score(own.logprob + math.log(DOUBT), own.tokens, max(1, own.rank))
        logprob = math.log1p(-DOUBT)
        if rest := answer.strip()[len(target) :]:
            begun = replace(prompt, text=f"{prompt.text}{prompt.separator}{target}", separator="")
            logprob += self.lm.score([(begun, rest)])[0].logprob
        return Score(logprob, own.tokens, 0)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Continuations that say the fact: as the model does itself, or else from their beginning on."""
        said = super().generate(prompts, max_new_tokens, temperature=temperature, seed=seed)
        return [
            answer
            if not isinstance(prompt, FactPrompt) or not prompt.replies or prompt.says_fact(answer.text)
            else self._going_on(prompt, prompt.opened(), max_new_tokens, temperature, seed)
            for prompt, answer in zip(prompts, said, strict=True)
        ]

    def beginning(self, prompt: FactPrompt, answer: str) -> str | None:
        """The first sentence where it says the fact, else the fact."""
        return super().beginning(prompt, answer) if prompt.says_fact(answer) else prompt.opened()
