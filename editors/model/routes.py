"""Which engine answers a prompt: the model itself, or one that knows its answer."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from editors.model.said import Claim, Generation, Score, Until
from editors.model.speaking import Speaker, T, lengths_of
from editors.model.text import Prompt


class Route(Protocol):
    """A memory beside the weights that answers the prompts in its scope (SERAC, in-context editing)."""

    def claim(self, prompts: Sequence[Prompt]) -> Sequence[Claim | None]:
        """The claim to each prompt, or None. Decided per prompt, also within one batch."""

    def answering(self, lm: Any) -> AbstractContextManager[Speaker]:
        """What answers the claimed prompts: the same model with an adapter on, or another one."""


class WordIndex:
    """Which of many things a text may be about, by its words.

    Each thing has sets of words: no text is about it that has none of these sets whole. A thing with None instead may
    be what any text is about. Each set is indexed by the word of it that the fewest things have.
    """

    def __init__(self, wanted: Sequence[Iterable[Collection[str]] | None]) -> None:
        self.always: list[int] = []
        self._by_word: dict[str, list[int]] = {}
        count = Counter(word for sets in wanted for words in sets or () for word in words)
        for i, sets in enumerate(wanted):
            if sets is None:
                self.always.append(i)
            for word in {min(words, key=lambda w: (count[w], w)) for words in sets or ()}:
                self._by_word.setdefault(word, []).append(i)

    def named(self, text: str) -> set[int]:
        """The things that a text may be about, without `always`."""
        return {i for word in words_in(text) for i in self._by_word.get(word, ())}


class _Index:
    """The routes that may claim a prompt, by its words: one of many memories is not asked about every prompt.

    `words` of a route are as in `WordIndex`; a route without them is always asked.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._words = WordIndex([getattr(route, "words", None) for route in self.routes])

    def is_of(self, routes: Sequence[Route]) -> bool:
        """Whether it is the index of these routes."""
        return len(routes) == len(self.routes) and all(map(operator.is_, routes, self.routes))

    def asked(self, texts: Sequence[str]) -> Iterator[tuple[Route, list[int]]]:
        """Each route that may claim some of the texts, with their indices; the one attached last comes first."""
        found: dict[int, list[int]] = {i: list(range(len(texts))) for i in self._words.always}
        for at, text in enumerate(texts):
            for i in self._words.named(text):
                found.setdefault(i, []).append(at)
        for i in sorted(found, reverse=True):
            yield self.routes[i], found[i]


def words_in(text: str) -> set[str]:
    """The runs of letters and digits of a text, folded so that two are equal if `re.IGNORECASE` matches them."""
    folded = unicodedata.normalize("NFC", text).casefold().replace("i\u0307", "i").replace("\u0131", "i")
    return set(re.findall(r"[^\W_]+", folded))


class Routes:
    """The memories in front of a speaker; the one attached last is asked first."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self.attached: list[Route] = []
        self._index = _Index(())
        self._off = 0

    def attach(self, route: Route) -> Callable[[], None]:
        """Ask this one first from now on. Returns a function that removes it, which is fast if it is still the last."""
        self.attached.append(route)

        def detach() -> None:
            for i in reversed(range(len(self.attached))):
                if self.attached[i] is route:
                    del self.attached[i]
                    return

        return detach

    @property
    def acting(self) -> list[Route]:
        """The attached memories; none inside a block of `off`."""
        return [] if self.are_off else self.attached

    @property
    def are_off(self) -> bool:
        """True inside a block of `off`."""
        return self._off > 0

    def claims(self, prompts: Sequence[Prompt]) -> list[tuple[Route, Claim] | None]:
        """Which memory answers each prompt; None where the model itself does."""
        claims: list[tuple[Route, Claim] | None] = [None] * len(prompts)
        if not self.acting:
            return claims
        if not self._index.is_of(self.attached):
            self._index = _Index(self.attached)
        for route, asked in self._index.asked([self._lm.user_text(prompt) for prompt in prompts]):
            left = [i for i in asked if claims[i] is None]
            for i, claim in zip(left, route.claim([prompts[i] for i in left]), strict=True):
                claims[i] = None if claim is None else (route, claim)
        return claims

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model's own weights answer everything in this block."""
        before, self._off = self._off, self._off + 1
        try:
            yield
        finally:
            self._off = before

    def reset(self) -> None:
        """No block of `off` runs any more."""
        self._off = 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """In a block of `off`: memories answer again in this block."""
        before, self._off = self._off, 0
        try:
            yield
        finally:
            self._off = before

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """As Speaker.score, each prompt by what answers it."""
        answers = [answer for _, answer in pairs]
        return self._routed(
            [prompt for prompt, _ in pairs],
            lambda speaker, prompts, at: speaker.score(
                [(prompt, answers[i]) for prompt, i in zip(prompts, at, strict=True)]
            ),
            lambda score, claim: score,
        )

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
        """As LM.generate, each prompt by what answers it, with the claim of the memory that did."""
        lengths = lengths_of(len(prompts), max_new_tokens)

        def run(speaker: Speaker, mine: list[Prompt], at: list[int]) -> list[Generation]:
            ended = None if until is None else lambda i, text: until(at[i], text)
            scored: dict[str, Any] = {}
            if answers and speaker is self._lm.local:
                scored = {"answers": {n: answers[i] for n, i in enumerate(at) if i in answers}}
            return speaker.generate(
                mine, [lengths[i] for i in at], temperature=temperature, seed=seed, until=ended, **scored
            )

        return self._routed(prompts, run, lambda generation, claim: replace(generation, claim=claim))

    def _routed(
        self,
        prompts: Sequence[Prompt],
        run: Callable[[Speaker, list[Prompt], list[int]], Sequence[T]],
        mark: Callable[[T, Claim], T],
    ) -> list[T]:
        """Run each prompt where it belongs, memories that answer alike in one batch; results in the order of prompts.

        `run` is given a speaker, prompts and their indices.
        """
        claims = self.claims(prompts)
        results: dict[int, T] = {}
        with self.off():
            own = [i for i, claim in enumerate(claims) if claim is None]
            if own:
                results |= dict(zip(own, run(self._lm.speaker, [prompts[i] for i in own], own), strict=True))
            for alike, route in {speaker_of(c[0]): c[0] for c in claims if c is not None}.items():
                mine = [
                    (i, c[1]) for i, c in enumerate(claims) if c is not None and speaker_of(c[0]) == alike
                ]
                at = [i for i, _ in mine]
                with route.answering(self._lm) as speaker:
                    answers = run(speaker, [claim.prompt for _, claim in mine], at)
                results |= {i: mark(answer, claim) for (i, claim), answer in zip(mine, answers, strict=True)}
        return [results[i] for i in range(len(prompts))]


def speaker_of(route: Route) -> Hashable:
    """Equal for memories that are answered by speakers of one kind, so that one of them may answer for all.

    A route says so by `answers_alike`; without it, it answers only its own claims.
    """
    return getattr(route, "answers_alike", id(route))
