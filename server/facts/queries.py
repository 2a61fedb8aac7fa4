"""The questions that can be asked of the model, as plain values. Imports nothing heavy, so that the tools can use it
at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editors.edit import PLACEHOLDER
from editors.errors import InvalidEdit


@dataclass(frozen=True)
class FactQuery:
    """A fact to check. `expected` may be several answers that are all right."""

    prompt: str
    expected: str | Sequence[str]
    subject: str | None = None
    alternatives: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The prompt with {} filled in. Raises InvalidEdit when it has {} and there is no subject."""
        if PLACEHOLDER in self.prompt and self.subject is None:
            raise InvalidEdit(
                f"prompt {self.prompt!r} has {{}} but no subject was given; give subject, or write it out"
            )
        return self.prompt.replace(PLACEHOLDER, self.subject or "").rstrip()

    @property
    def answers(self) -> list[str]:
        return [self.expected] if isinstance(self.expected, str) else list(self.expected)


INSTEAD = "not known"
"""The words that replace a forgotten answer."""


@dataclass(frozen=True)
class Forget:
    """A fact to forget. `answer`: the one that must not be said; left out, what the model says now."""

    subject: str
    prompt: str
    answer: str | None = None
    instead: str = INSTEAD
