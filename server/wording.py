"""Small parts of sentences that reports have in common."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 fact, 2 facts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_words(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."
