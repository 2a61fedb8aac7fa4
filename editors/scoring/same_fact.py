"""Whether two answers to one prompt state the same fact, in whatever words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from editors.edit import is_question
from editors.scoring.assertion import asserts, content_words, sentences
from editors.scoring.looping import is_looping
from editors.scoring.verdict import answered_with
from editors.scoring.words import occurrences, short_answer, tidy

ENOUGH = 0.5  # share of an answer's words that another one must have, where it has neither names nor numbers
STEM = 4  # letters in which a word agrees with one of the prompt to count as the same ("Japanese", "Japan")


def same_fact(prompt: str, was: str, now: str, right: str | None = None) -> bool:
    """Whether the answer now states what the answer before stated.

    What an answer states are its words that the prompt does not have: its names and numbers, or all its content
    words where it has none. Empty answers are the same only as empty answers; a looping one states nothing.

    Args:
        right: the right answer; where the first answer says it, the second one must.
    """
    if right and answered_with(prompt, was, right):
        return answered_with(prompt, now, right)
    if short_answer(was).casefold() == short_answer(now).casefold():
        return True
    if is_looping(now) or not now.strip():
        return False
    key = key_words(prompt, was)
    if not key:
        return False
    tidied = tidy(now)
    said = [word for word in key if _asserted(prompt, tidied, word)]
    return len(said) == len(key) if _telling(key) else len(said) >= ENOUGH * len(key)


def key_words(prompt: str, answer: str) -> list[str]:
    """The words of an answer that state something: names and numbers, else its content words; not the prompt's."""
    clause = sentences(tidy(answer))[0].text if is_question(prompt) else short_answer(answer)
    known = content_words(prompt)
    words = [w for w in re.findall(r"[^\W_]+", clause) if w.casefold() in content_words(clause)]
    new = [w for w in dict.fromkeys(words) if not _known(w.casefold(), known)]
    named = [w for w in new if _telling([w]) and not (w == words[0] and is_question(prompt) and len(new) > 1)]
    return named or new


def _telling(words: Iterable[str]) -> bool:
    return any(w[:1].isupper() or w[:1].isdigit() for w in words)


def _known(word: str, known: set[str]) -> bool:
    return word in known or (
        len(word) >= STEM and any(len(k) >= STEM and k[:STEM] == word[:STEM] for k in known)
    )


def _asserted(prompt: str, text: str, word: str) -> bool:
    return any(asserts(text, start, end, prompt) for start, end in occurrences(text, word))
