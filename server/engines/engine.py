"""What every engine can do here, and how it is spoken to."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from server.engines.artefacts import Artefact, Form
from server.engines.probes import Probe
from server.engines.proof import Reading
from server.engines.settings import EngineSettings
from server.errors import ServiceError

TIMEOUT = 120.0
"""Seconds for one answer: a first request after a start may compile something."""
QUICK = 2.0
"""Seconds for a look at whether an engine is there."""
UNREACHABLE = "the engine cannot be reached"
LARGEST = 64 * 2**20
"""Bytes that are read of one answer."""


class EngineError(ServiceError):
    """An engine refused, failed or answered what cannot be read; the text says which and what it said."""


class Engine(ABC):
    """One engine. `put` hands an artefact over; whether it landed, only `read` can tell."""

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
    def read(self, probes: Sequence[Probe]) -> list[Reading]:
        """What it says to every probe, caches bypassed. What cannot be read has an `error`; nothing is raised."""

    def look(self) -> str:
        """Empty when the engine is there; else what is wrong. It proves nothing."""
        return ""

    def base_is_missing(self) -> str:
        """What must be there before a push and is not; empty when all is."""
        return ""


class HttpEngine(Engine):
    """An engine at an address."""

    health: ClassVar[str] = "/health"

    def call(
        self, path: str, body: Any = None, *, timeout: float = TIMEOUT, method: str | None = None
    ) -> Any:
        """The JSON that the engine answers; the text where it is none. Raises EngineError for any other status."""
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
            raise EngineError(f"{UNREACHABLE}: {self.settings.name}{path}: {error}") from None
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

    def read(self, probes: Sequence[Probe]) -> list[Reading]:
        readings: list[Reading] = []
        for probe in probes:
            gone = bool(readings) and readings[-1].error.startswith(UNREACHABLE)  # asking on would only wait
            readings.append(readings[-1] if gone else self._reading(probe))
        return readings

    def _reading(self, probe: Probe) -> Reading:
        try:
            return self.ask(probe)
        except EngineError as error:
            return Reading(error=str(error))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return Reading(error=f"{self.settings.name}: its answer cannot be read: {error!r}")

    @abstractmethod
    def ask(self, probe: Probe) -> Reading:
        """What it says to one probe. May raise EngineError, and whatever reading a strange answer raises."""


def number(value: Any) -> float:
    """A finite number. Raises ValueError for anything else: an engine that tells none has told nothing."""
    found = float(value)
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"{value!r} is no log-probability")
    return found


def by_word(probe: Probe, told: Mapping[str, float]) -> dict[int, float]:
    """Log-probabilities by text as such by token id. What the models here do not say gets a number below 0."""
    ids: dict[str, list[int]] = {}
    for token, word in probe.words.items():
        ids.setdefault(word, []).append(token)
    found: dict[int, float] = {}
    for n, (word, logprob) in enumerate(told.items()):
        same = ids.get(word) or [-1 - n]
        # Of several tokens with one text, the one that the corrected model finds the most probable.
        found[max(same, key=lambda token: probe.live.top.get(token, -math.inf))] = logprob
    return found
