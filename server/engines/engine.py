"""The interface of every engine, and the HTTP requests of those with an address."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from server.engines.artefacts import Artefact, Form
from server.engines.probes import EngineQuestion, ProofProbe
from server.engines.proof import EngineReading
from server.engines.settings import EngineSettings
from server.errors import ServiceError

TIMEOUT = 120.0
"""Seconds for one answer: a first request after a start may compile something."""
QUICK = 2.0
"""Seconds for a look at whether an engine is there."""
UNREACHABLE = "the engine cannot be reached"
LARGEST = 64 * 2**20
"""Bytes that are read of one answer."""


@dataclass(frozen=True)
class UnderWay:
    """Questions under way."""

    read: Callable[[Sequence[ProofProbe]], list[EngineReading]]
    """Waits for the answers and reads them as those to these probes, in the same order."""
    stop: Callable[[], None] = lambda: None
    """Ask no further questions, and ignore the answers that are still to come."""


class EngineError(ServiceError):
    """An engine refused, failed, or gave an answer that cannot be read; the text says which, and quotes it."""


class Engine(ABC):
    """One engine. `put` hands an artefact over; only `read` shows whether the engine uses it."""

    form: ClassVar[Form]

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    @abstractmethod
    def put(self, artefact: Artefact) -> None:
        """Make the engine serve this artefact in place of the one before. Raises EngineError."""

    @abstractmethod
    def take_off(self) -> None:
        """Make the engine serve the base model, as before its first artefact. Raises EngineError."""

    @abstractmethod
    def read(self, probes: Sequence[ProofProbe]) -> list[EngineReading]:
        """Its answer to every probe, caches bypassed. An answer that cannot be read has an `error`; nothing is
        raised."""

    def begin(self, questions: Sequence[EngineQuestion]) -> UnderWay:
        """Start to ask what will be the probes' questions; the result waits, and reads the first tokens.

        Here all is asked, and when the result is called.
        """
        del questions
        return UnderWay(self.read)

    def look(self) -> str:
        """Empty when the engine answers; else what is wrong. It does not say what the engine holds."""
        return ""

    def base_is_missing(self) -> str:
        """What a push needs and does not find; empty when nothing is missing."""
        return ""


@dataclass(frozen=True)
class Heard:
    """An engine's raw answer to a question, or what went wrong."""

    question: EngineQuestion
    said: Any = None
    error: str = ""


class HttpEngine(Engine):
    """An engine at an address."""

    health: ClassVar[str] = "/health"
    together: ClassVar[int] = 1
    """Questions that it answers at once without being slower for each."""

    def call(
        self, path: str, body: Any = None, *, timeout: float = TIMEOUT, method: str | None = None
    ) -> Any:
        """The engine's answer as JSON, or as text if it is not JSON. Raises EngineError for any other status."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if token := self.settings.token:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(
            f"{self.settings.url}{path}", data=data, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read(LARGEST).decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            raise EngineError(f"{self.settings.name}: {path} answered {error.code}: {said[:500]}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            why = getattr(why, "strerror", None) or why
            raise EngineError(f"{UNREACHABLE}: {self.settings.name}{path}: {why}") from None
        with suppress(ValueError):
            return json.loads(text)
        return text

    def look(self) -> str:
        try:
            self.call(self.health, timeout=QUICK)
        except EngineError as error:
            return str(error)
        return ""

    def wait_until_there(self, seconds: float) -> None:
        """Wait for a starting engine. Raises EngineError when the time is up."""
        end = time.monotonic() + seconds
        while problem := self.look():
            if time.monotonic() > end:
                raise EngineError(f"{self.settings.name} did not come back in {seconds:g} s: {problem}")
            time.sleep(0.1)

    def read(self, probes: Sequence[ProofProbe]) -> list[EngineReading]:
        return self._readings(probes, self.hear([probe.question for probe in probes]))

    def begin(self, questions: Sequence[EngineQuestion]) -> UnderWay:
        pool, stopped = ThreadPoolExecutor(1, "errata-asking"), list[str]()
        asked = pool.submit(self.hear, [replace(question, tokens=1) for question in questions], stopped)
        pool.shutdown(wait=False)
        return UnderWay(
            lambda probes: self._readings(probes, asked.result()),
            lambda: stopped.append("not asked any more"),
        )

    def hear(self, questions: Sequence[EngineQuestion], gone: list[str] | None = None) -> list[Heard]:
        """Ask each question once, the longest answers first, `together` at a time; stop when `gone` gives a reason."""
        gone = [] if gone is None else gone  # it cannot be reached, so further questions would only wait

        def one(question: EngineQuestion) -> Heard:
            if gone:
                return Heard(question, error=gone[0])
            try:
                return Heard(question, self.ask(question))
            except EngineError as error:
                if str(error).startswith(UNREACHABLE):
                    gone.append(str(error))
                return Heard(question, error=str(error))

        each = sorted(dict.fromkeys(questions), key=lambda question: -question.tokens)
        with ThreadPoolExecutor(self.together) as pool:
            found = dict(zip(each, pool.map(one, each), strict=True))
        return [found[question] for question in questions]

    def _readings(self, probes: Sequence[ProofProbe], heard: Sequence[Heard]) -> list[EngineReading]:
        return [self._reading(probe, one) for probe, one in zip(probes, heard, strict=True)]

    def _reading(self, probe: ProofProbe, heard: Heard) -> EngineReading:
        if heard.error:
            return EngineReading(error=heard.error)
        try:
            return self.understand(probe, heard.question, heard.said)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return EngineReading(error=f"{self.settings.name}: its answer cannot be read: {error!r}")

    @abstractmethod
    def ask(self, question: EngineQuestion) -> Any:
        """The JSON that it answers to one question. Raises EngineError."""

    @abstractmethod
    def understand(self, probe: ProofProbe, question: EngineQuestion, said: Any) -> EngineReading:
        """The reading of an answer to the probe's question. May raise any error for an answer of another form."""


def number(value: Any) -> float:
    """A finite number. Raises ValueError for anything else: without a number there is no reading."""
    found = float(value)
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"{value!r} is not a log-probability")
    return found


def scores_of(
    live: Sequence[int], answer: Sequence[int], logprobs: Sequence[float], tops: Sequence[Mapping[int, float]]
) -> tuple[float, ...]:
    """Log-probabilities that an engine's greedy answer gives for the tokens of the corrected model's answer, up to
    the first token where the two differ. At that token: its value in `tops`, or the least of them. Raises ValueError
    if the engine returned fewer tokens.
    """
    found: list[float] = []
    for n, token in enumerate(live):
        if n >= len(answer):
            raise ValueError(f"its answer ends after {n} of {len(live)} tokens")
        if answer[n] != token:
            return (*found, number(tops[n].get(token, min(tops[n].values()))))
        found.append(number(logprobs[n]))
    return tuple(found)


def by_word(probe: ProofProbe, told: Sequence[tuple[str, float]]) -> dict[int, float]:
    """Log-probabilities by token id, from those by text. Texts that the models here do not use get an id below 0.
    Several tokens may have the same text, such as half a character each: they are matched in the order of their
    probability, by the engine and by the corrected model.
    """
    ids: dict[str, list[int]] = {}
    for token in sorted(probe.words, key=lambda token: -probe.live.top.get(token, -math.inf)):
        ids.setdefault(probe.words[token], []).append(token)
    found: dict[int, float] = {}
    for n, (word, logprob) in enumerate(sorted(told, key=lambda pair: -pair[1])):
        same = ids.get(word)
        found[same.pop(0) if same else -1 - n] = logprob
    return found
