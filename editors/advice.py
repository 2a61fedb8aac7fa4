"""What to change when an edit did not work: each method says it for its own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Problem = Literal["too_weak", "too_strong"]
"""too_weak: the model does not answer with the target, or only in the prompt's own words.
too_strong: neighbours' answers or ordinary text changed too much."""


@dataclass(frozen=True)
class Remedy:
    """A change of one parameter that helps: its present value times `factor` as far as `limit`, or `value`.

    `start` is what a parameter left at None counts as before it is multiplied. `widens`: it reaches further wordings,
    and does nothing for an edit that is not said in its own.
    """

    parameter: str
    effect: str  # what the change does, as the end of a sentence: "lets the value move further"
    factor: float | None = None
    limit: float | None = None
    value: Any = None
    start: float | None = None
    widens: bool = False

    def apply(self, current: Any) -> Any:
        """The value to try in place of `current`; `current` itself where there is none."""
        if self.factor is None:
            return self.value
        base = self.start if current is None else current
        if base is None:
            return current
        scaled = round(base * self.factor) if isinstance(base, int) else float(f"{base * self.factor:.3g}")
        passed = self.limit is not None and (scaled > self.limit if self.factor > 1 else scaled < self.limit)
        return current if passed else scaled


@dataclass(frozen=True)
class Advice:
    """One thing to try. `params` are accepted by the method as they are; empty where none of them helps."""

    text: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """The prompts that showed an edit to be too weak or too strong. Advice can be derived from them, and tested on
    them."""

    own: Sequence[str] = ()  # the edits' prompts
    unsaid: Sequence[str] = ()  # those of them that are not answered with the target
    held: Sequence[str] = ()  # other forms of the facts that are answered with the target
    missed: Sequence[str] = ()  # forms that are not
    moved: Sequence[str] = ()  # other facts that were said before and are not now


@dataclass(frozen=True)
class Preset:
    """Parameter values that belong together, and where they come from."""

    params: Mapping[str, Any]
    source: str
