"""Stop strings: where a text ends before one of them, and how much of a growing text is safe to show."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"
"""What a decoder writes for a character whose last bytes are still missing."""


def cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before its first stop string; None where it has none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def shown(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that later tokens cannot change: without half a character or half a stop string at
    its end."""
    ended = cut(text, stops)
    if ended is not None:
        return ended
    text = text.rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
