"""Degenerate text: what a broken model says again and again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from editors.constants import assumed
from editors.scoring.words import is_spaced

REPEATS = 3  # a unit said so often in a row is a loop
LONGEST_UNIT = 8  # tokens of a unit that may loop
VARIETY = assumed(
    0.45,
    "Share of distinct tokens (words, or signs of a script without spaces) below which a text of ten or more loops.",
    "ordinary answers of up to 30 words have .7 and more, the loops seen in trials .42 and less",
)
ENOUGH = 10  # tokens from which on variety is looked at
MOST = 40  # longer texts say ordinary words again; variety is looked at in their first tokens
_RUN = re.compile(r"([^\W_])\1{7,}")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def is_looping(text: str) -> bool:
    """True for a text that says one unit at least three times in a row, or hardly varies at all.

    A name that doubles itself ("Walla Walla") is no loop.
    """
    tokens = _tokens(text)
    if _RUN.search(text) or (not tokens and len(text.strip()) >= 8):
        return True
    return _repeats_a_unit(tokens) or _hardly_varies(tokens)


def _tokens(text: str) -> list[str]:
    """Words in lower case; the signs of a script without spaces one by one."""
    tokens: list[str] = []
    for word in _WORD.findall(text.casefold()):
        tokens += [word] if all(is_spaced(c) or c in "'’-" for c in word) else list(word)
    return tokens


def _repeats_a_unit(tokens: Sequence[str]) -> bool:
    """A unit of one to eight tokens, three times in a row, that makes up at least half of the text."""
    for size in range(1, LONGEST_UNIT + 1):
        same = 0  # tokens in a row that equal the one `size` before
        for i in range(size, len(tokens)):
            same = same + 1 if tokens[i] == tokens[i - size] else 0
            if same >= size * (REPEATS - 1) and 2 * (same + size) >= len(tokens):
                return True
    return False


def _hardly_varies(tokens: Sequence[str]) -> bool:
    head = tokens[:MOST]
    return len(head) >= ENOUGH and len(set(head)) < VARIETY * len(head)
