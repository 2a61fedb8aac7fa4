"""Where an answer that is being generated may end, because what follows cannot change what it says."""

from __future__ import annotations

import re
from collections.abc import Iterable

from editors.scoring.verdict import answered_with, is_long
from editors.scoring.words import SENTENCE_END, short_answer


def clause_is_over(text: str, answers: Iterable[str] = ()) -> bool:
    """Whether the first clause of a completion has ended, so that it says one of the answers now or never.

    After its end a line begins, or a word that is none of the clause's: an answer that repeats itself goes on, so that
    a loop is seen. Long answers are compared as a whole, so that nothing is over.
    """
    wanted = list(answers)
    clause = _words(short_answer(text))
    if not clause or any(is_long(answer) for answer in wanted):
        return False
    longest = max((len(_words(answer)) for answer in wanted), default=1)
    said = _words(text)
    after = said[len(clause) :]
    if after:
        new = not any(_may_be(word, known) for word in after for known in clause)
        return new and len(said) > longest
    ends_in_line = "\n" in text.lstrip() and not clause[-1][-1].isdigit()  # "5\n000" may be one number
    return ends_in_line and len(clause) >= longest


def sentence_says(prompt: str, text: str, answer: str) -> bool:
    """Whether a chat answer has said an answer in a whole sentence, after which other words follow."""
    end = next((m.end() for m in SENTENCE_END.finditer(text)), None)
    if end is None or is_long(answer) or not answered_with(prompt, text[:end], answer):
        return False
    after = _words(text[end:])
    return bool(after) and not set(after) & set(_words(answer))


def _may_be(word: str, known: str) -> bool:
    """Whether a word, which may go on, is another one."""
    return known.startswith(word) or word.startswith(known)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
