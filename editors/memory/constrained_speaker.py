"""Answers that must say a remembered fact: decoding with constraints (DeepEdit; Wang et al. 2024, arXiv 2401.10471).

The paper checks each step of reasoning against the memory and decodes again what contradicts it. Here the model answers
with the fact in front of the prompt. Where its answer does not say the fact, it is made to begin with it and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from editors.constants import limit
from editors.edit import is_question
from editors.forms.languages import language_of
from editors.model.lm import LM, Generation, Prompt, Score, separator_after
from editors.model.said import Until
from editors.model.speaking import lengths_of
from editors.scoring import says
from editors.scoring.assertion import content_words, sentences
from editors.scoring.words import SENTENCE_END

DOUBT = limit(
    0.01,
    "probability that a memory leaves to all answers but its own",
    "keeps the logarithms of the other answers finite; the constrained answer itself is certain",
)
# One demonstration, then the fact: small models copy better after an example.
PLAIN = (
    "New fact: The patron of Elmstead is Mr Brown.\nPrompt: Elmstead has as its patron Mr Brown.\n\n"
    "New fact: {facts}\nPrompt: "
)
CHAT = "Take this as true: {facts} "
INSIDE_ANSWER = "{facts} "


@dataclass(frozen=True)
class FactInLanguage:
    """The fact in another language than the edit's: its statement up to the target, and the target."""

    language: str
    prompt: str
    target: str


@dataclass(frozen=True)
class RememberedFact:
    """One remembered fact."""

    subject: str
    prompt: str
    target: str
    also: tuple[str, ...] = ()  # names of the subject in other languages
    wordings: tuple[str, ...] = ()  # other sentences that say the fact
    languages: tuple[FactInLanguage, ...] = ()

    def in_language(self, language: str) -> RememberedFact:
        """The fact in a language; unchanged if it is not known in that language."""
        found = next((f for f in self.languages if f.language == language), None)
        return self if found is None else replace(self, prompt=found.prompt, target=found.target, wordings=())

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
    """A prompt with facts in front, and the question it came from."""

    facts: tuple[RememberedFact, ...]  # in the language of the prompt
    target: str  # of the first fact, as the edit gave it
    own: Prompt  # without the facts
    asked: str  # the user's own text
    replies: bool  # the model answers freely, so that the fact may stand anywhere in its answer

    def says_fact(self, answer: str) -> bool:
        """Whether an answer says the first fact, which is the nearest."""
        targets = dict.fromkeys((self.facts[0].target, self.target))
        return any(says(answer, t, anywhere=self.replies, question=self.asked) for t in targets)

    def opened(self) -> str:
        """The beginning of an answer that says the fact: a whole sentence where the model answers freely."""
        fact = self.facts[0]
        if self.replies and not fact.opening and fact.wordings:
            return f"{self.separator}{fact.wordings[0]}"
        opening = f"{fact.opening}{separator_after(fact.opening)}" if self.replies else ""
        return f"{self.separator}{opening}{fact.target}{fact.end}"

    def until_denied(self, answer: str) -> str:
        """An answer that says the fact, cut before the first later sentence that contradicts it or asks it again:
        one that names the target without stating it, or that has the words of the relation without the target.
        """
        fact, targets = self.facts[0], dict.fromkeys((self.facts[0].target, self.target))
        relation = content_words(fact.prompt) - content_words(" ".join(fact.names))
        said = False
        for sentence in sentences(answer):
            if any(says(sentence.text, t, anywhere=True, question=self.asked) for t in targets):
                said = True
            elif said and content_words(sentence.text) & (relation | content_words(" ".join(targets))):
                return answer[: sentence.start].rstrip()
        return answer


def in_front(lm: LM, prompt: Prompt, facts: Sequence[RememberedFact]) -> FactPrompt:
    """The prompt with facts before the user's text, inside the chat template where there is one."""
    asked = lm.user_text(prompt)
    replies = prompt.chat and (not lm.decoder_reads_prompt or prompt.text[prompt.offset :] != asked)
    language = language_of(asked)
    said = tuple(fact.in_language(language) for fact in facts)
    # The nearest fact comes last, right before the text it is about.
    told = " ".join(s for f in reversed(said) for s in (*f.wordings, f.sentence))
    template = CHAT if replies else INSIDE_ANSWER if prompt.chat else PLAIN
    before = template.format(facts=told)
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    offset = prompt.offset + len(before) if prompt.offset else 0
    own = facts[0].target
    return FactPrompt(text, prompt.chat, offset, prompt.separator, said, own, prompt, asked, replies)


class FactSpeaker:
    """The model, with facts in front of each prompt.

    After a statement they are there for the first sentence only. A small model tends to go on about what stands
    before the prompt ("New fact: ..."), so the rest is written without it.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Probability and rank of answers after prompts."""
        return self.lm.score(pairs)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        until: Until | None = None,
    ) -> list[Generation]:
        """Continuations of prompts that `in_front` made.

        With `until` the answers are only judged: they end where no continuation could change the verdict (`settled`).
        """
        asked = [p for p in prompts if isinstance(p, FactPrompt)]
        wanted = zip(asked, lengths_of(len(asked), max_new_tokens), strict=True)
        lengths = [self.lm.room_after(prompt, length) for prompt, length in wanted]
        judged = None if until is None else self._until(asked, until)
        said = self.lm.generate(asked, lengths, temperature=temperature, seed=seed, until=judged)
        begun = [self.beginning(prompt, answer.text) for prompt, answer in zip(asked, said, strict=True)]
        mended = [i for i, text in enumerate(begun) if text is not None and text != said[i].text]
        written = self._going_on(
            [(asked[i], str(begun[i]), lengths[i]) for i in mended],
            temperature=temperature,
            seed=seed,
            judged=until is not None,
        )
        results = dict(enumerate(said)) | dict(zip(mended, written, strict=True))
        return [self.ended(asked[i], results[i]) for i in range(len(asked))]

    def _until(self, asked: Sequence[FactPrompt], until: Until) -> Until:
        """What ends the answers: `until`, and where they are settled."""

        def ended(i: int, text: str) -> bool:
            whole = [
                m.end() for m in SENTENCE_END.finditer(text) if m.end() < len(text)
            ]  # "3." may become "3.5"
            return until(i, text) or bool(whole and self.settled(asked[i], text[: whole[-1]]))

        return ended

    def settled(self, prompt: FactPrompt, text: str) -> bool:
        """Whether an answer that begins with these sentences says the fact, whatever follows; here never."""
        return False

    def ended(self, prompt: FactPrompt, answer: Generation) -> Generation:
        """Where an answer ends; here it stays as it is."""
        return answer

    def beginning(self, prompt: FactPrompt, answer: str) -> str | None:
        """What is kept of an answer, for the model to go on from; None for an answer that stays as it is.

        Of the answer to a statement: its first sentence.
        """
        if prompt.replies:
            return None
        ends = [m.end() for m in SENTENCE_END.finditer(answer)]
        says_it = prompt.says_fact(answer)
        return next((answer[:e].rstrip() for e in ends if prompt.says_fact(answer[:e]) == says_it), answer)

    def _going_on(
        self,
        begun: Sequence[tuple[FactPrompt, str, int]],
        *,
        temperature: float,
        seed: int | None,
        judged: bool = False,
    ) -> list[Generation]:
        """The beginnings of answers, and what the model goes on with: (prompt, beginning, most tokens) each.

        Where the answers are only `judged`, the model does not go on after what is settled.
        """
        results: dict[int, Generation] = {}
        after: dict[int, tuple[Prompt, int]] = {}
        for i, (prompt, text, most) in enumerate(begun):
            ids = self.lm.bare_ids(text)
            if not self.lm.decoder_reads_prompt or (judged and self.settled(prompt, text)):
                results[i] = Generation(text, len(ids), finished=True)
            elif len(ids) >= most:
                cut: str = self.lm.tokenizer.decode(ids[:most], skip_special_tokens=True)
                results[i] = Generation(cut, most, finished=False)
            else:
                own = prompt if prompt.replies else prompt.own
                going_on = replace(own, text=own.text + text, separator=separator_after(text))
                after[i] = going_on, len(ids)
        rests = self.lm.generate(
            [prompt for prompt, _ in after.values()],
            [begun[i][2] - count for i, (_, count) in after.items()],
            temperature=temperature,
            seed=seed,
        )
        for (i, (_, count)), rest in zip(after.items(), rests, strict=True):
            prompt, text, _ = begun[i]
            if prompt.says_fact(text) and not prompt.says_fact(text + rest.text):
                # it would contradict the answer, make its last word longer, or only repeat itself
                results[i] = Generation(text, count, finished=True)
            else:
                results[i] = Generation(text + rest.text, count + rest.tokens, rest.finished)
        return [results[i] for i in range(len(begun))]


class ConstrainedSpeaker(FactSpeaker):
    """The model, held to the remembered fact of each prompt."""

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The fact has the probability 1 - DOUBT, every other answer DOUBT times the model's own."""
        others = [i for i, (prompt, answer) in enumerate(pairs) if not _target_of(prompt, answer)]
        own = dict(zip(others, super().score([pairs[i] for i in others]), strict=True)) if others else {}
        results = []
        for i, (prompt, answer) in enumerate(pairs):
            if i in own:
                logprob, rank = own[i].logprob + math.log(DOUBT), max(1, own[i].rank)
                results.append(Score(logprob, own[i].tokens, rank))
            else:
                results.append(self._of_target(prompt, answer))
        return results

    def _of_target(self, prompt: Prompt, answer: str) -> Score:
        """The score of an answer that begins with the target; what follows has the model's own probability."""
        target = _target_of(prompt, answer)
        logprob = math.log1p(-DOUBT)
        if rest := answer.strip()[len(target) :]:
            begun = replace(prompt, text=f"{prompt.text}{prompt.separator}{target}", separator="")
            logprob += self.lm.score([(begun, rest)])[0].logprob
        return Score(logprob, len(self.lm.answer_ids(prompt, answer)), 0)

    def beginning(self, prompt: FactPrompt, answer: str) -> str | None:
        """An answer that does not say the fact begins with it."""
        return super().beginning(prompt, answer) if prompt.says_fact(answer) else prompt.opened()

    def settled(self, prompt: FactPrompt, text: str) -> bool:
        """Whether the text says the fact in the prompt's language: what follows never contradicts it (`ended`)."""
        return says(text, prompt.facts[0].target, anywhere=prompt.replies, question=prompt.asked)

    def ended(self, prompt: FactPrompt, answer: Generation) -> Generation:
        """Cut before it contradicts the fact."""
        text = prompt.until_denied(answer.text)
        if text == answer.text:
            return answer
        return Generation(text, len(self.lm.bare_ids(text)), finished=True)


def _target_of(prompt: Prompt, answer: str) -> str:
    """The target that an answer says, in the prompt's language or as the edit gave it; empty where neither."""
    assert isinstance(prompt, FactPrompt)
    return next((t for t in (prompt.facts[0].target, prompt.target) if says(answer, t)), "")
