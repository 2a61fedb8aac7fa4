"""The verdict on one answer: does it say the target?"""

from __future__ import annotations

import re

from editors.constants import assumed
from editors.edit import is_question
from editors.scoring.assertion import asserts
from editors.scoring.looping import is_looping
from editors.scoring.words import at_start, occurrences, tidy

LONG_WORDS = assumed(
    12,
    "fewest words of a long target, which is said when nearly all of its words come in order",
    "a name or a date has fewer, a sentence more",
)
IN_ORDER = 0.9  # share of a long target's words that must come in order


def says(answer: str, target: str, *, anywhere: bool = False, question: str = "") -> bool:
    """Whether an answer says the target as whole words.

    After a statement the answer must begin with it, an article aside. With `anywhere` (a chat answer) it may
    stand in a sentence, but must be asserted there: not negated, asked about or merely mentioned. A looping
    answer says nothing. A long target (12 words and more) is said when 0.9 of its words come in order.

    Args:
        question: what was asked; it separates the answer from names that are only mentioned.
    """
    answer, target = tidy(answer), tidy(target)
    if not target or (is_looping(answer) and not is_looping(target)):
        return False
    if is_long(target):
        return share_in_order(answer, target) >= IN_ORDER
    begins = at_start(answer, target)
    if begins is not None and not anywhere:
        return not answer[begins[1] :].lstrip().startswith(("?", "？"))
    return anywhere and any(asserts(answer, *at, question) for at in occurrences(answer, target))


def answered_with(prompt: str, answer: str, target: str) -> bool:
    """Whether a prompt is answered with the target: at once after a completion, anywhere in a chat answer."""
    return says(answer, target, anywhere=is_question(prompt), question=prompt)


def is_long(target: str) -> bool:
    """True for a sentence or a paragraph, which most methods cannot write as one value."""
    return len(_words(target)) >= LONG_WORDS


def share_in_order(answer: str, target: str) -> float:
    """Share of the target's words that the answer has in the same order (longest common subsequence)."""
    said, wanted = _words(answer), _words(target)
    best = [0] * (len(said) + 1)
    for word in wanted:
        row = [0]
        for i, other in enumerate(said):
            row.append(best[i] + 1 if word == other else max(best[i + 1], row[i]))
        best = row
    return best[-1] / max(1, len(wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
