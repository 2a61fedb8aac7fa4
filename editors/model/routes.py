"""Which engine answers a prompt: the model itself, or one that knows its answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from editors.model.speaking import Claim, Generation, Score, Speaker, T, Until, lengths_of
from editors.model.text import Prompt


class Route(Protocol):
    """A memory beside the weights that answers the prompts in its scope (SERAC, in-context editing)."""

    def claim(self, prompts: Sequence[Prompt]) -> Sequence[Claim | None]:
        """The claim to each prompt, or None. Decided per prompt, also within one batch."""

    def answering(self, lm: Any) -> AbstractContextManager[Speaker]:
        """What answers the claimed prompts: the same model with an adapter on, or another one."""


class Routes:
    """The memories in front of a speaker; the one attached last is asked first."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self.attached: list[Route] = []

    def claims(self, prompts: Sequence[Prompt]) -> list[tuple[Route, Claim] | None]:
        """Which memory answers each prompt; None where the model itself does."""
        claims: list[tuple[Route, Claim] | None] = [None] * len(prompts)
        for route in reversed(self.attached):
            left = [i for i, claim in enumerate(claims) if claim is None]
            for i, claim in zip(left, route.claim([prompts[i] for i in left]), strict=True):
                claims[i] = None if claim is None else (route, claim)
        return claims

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model's own weights answer everything in this block."""
        attached, self.attached = self.attached, []
        try:
            yield
        finally:
            self.attached = attached

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
    ) -> list[Generation]:
        """As Speaker.generate, each prompt by what answers it, with the claim of the memory that did."""
        lengths = lengths_of(len(prompts), max_new_tokens)

        def run(speaker: Speaker, mine: list[Prompt], at: list[int]) -> list[Generation]:
            ended = None if until is None else lambda i, text: until(at[i], text)
            return speaker.generate(
                mine, [lengths[i] for i in at], temperature=temperature, seed=seed, until=ended
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

    A route says so by `answers_alike`; without it only its own claims are answered alike.
    """
    return getattr(route, "answers_alike", id(route))
