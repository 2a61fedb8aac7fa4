"""Where words and numbers begin and end in running text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from editors.normal_form import normal_form

_CLAUSE_END = re.compile(r"[;:!?()\[\]\"“”\n\r。，；：！？（）]|(?<!\d)[.,]|[.,](?!\d)|\s[-–—]\s")
_MARKUP = "\"'“”‘*_`«»„ \t\n\r"
_SCALES = (
    r"hundred|thousand|million|billion|trillion|dozen|"
    r"mille|millions?|milliards?|tausend|millionen|milliarden?|mil|millones|miliardi?|milioni"
)
_ELISION = re.compile(r"(?:^|[^\w])(?:[ldnjmtsc]|qu|all|dell|nell|sull|dall|un)$", re.IGNORECASE)
# Scripts that write words without spaces between them, and Hangul, whose particles join the noun.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HANGUL")
_ARTICLES = (
    r"(?:(?:the|an?|der|die|das|den|dem|des|eine?[nmrs]?|les?|la|une?|el|los|las|unos?|unas?|il|lo|gli|os?|as|uma?|"
    r"het|een|de)\s+|l['’]\s?)?"
)

SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？\n]")
"""Where a sentence ends, in languages with and without spaces."""


def normalise(text: str) -> str:
    """Case-folded text with single spaces and without leading articles and quotes."""
    return re.sub(r"^(the|a|an) ", "", tidy(text).casefold())


def tidy(text: str) -> str:
    """A text in its normal form, without quotes or emphasis around it or in it."""
    return normal_form(re.sub(r"\*\*|__|`", "", text)).strip(_MARKUP)


def short_answer(text: str) -> str:
    """The first clause of a continuation: what a reader takes for the answer."""
    text = text.strip().lstrip(_MARKUP)
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip().strip(_MARKUP)


def is_spaced(character: str) -> bool:
    """True for a letter or digit of a script that puts spaces between words."""
    return character.isalnum() and not unicodedata.name(character, "").startswith(_UNSPACED)


def occurrences(text: str, target: str) -> Iterator[tuple[int, int]]:
    """Where a tidy text has the target as whole words, in any case: (start, end).

    An article that only one of them has is no difference.
    """
    bare = re.sub(r"^(?:the|an?) (?=\S)", "", target, flags=re.IGNORECASE)
    for found in re.finditer(re.escape(bare), text, re.IGNORECASE):
        if starts_word(text, found.start()) and ends_word(text, found.end(), bare):
            yield found.span()


def at_start(text: str, target: str) -> tuple[int, int] | None:
    """Where a tidy text begins with the target, an article before it aside; None if it does not."""
    article = re.match(_ARTICLES, text, re.IGNORECASE)
    after_article = article.end() if article else 0
    for start, end in occurrences(text, target):
        if start in (0, after_article):
            return start, end
    return None


def starts_word(text: str, start: int) -> bool:
    """False if a word or number that began earlier continues at `start`."""
    first, before = text[start : start + 1], text[:start]
    last = before[-1:]
    if not last:
        return True
    if last.isspace():
        grouped = re.match(r"\d{3}(?!\d)", text[start:]) and re.search(r"(?<!\d)\d{1,3}\s$", before)
        return grouped is None
    if is_spaced(last) or last == "_" or unicodedata.category(last).startswith("M"):
        return not (is_spaced(first) or first in "+#&")
    if last in "-−‐‑–":  # "Coca-Cola", and a minus sign before a number
        joined = is_spaced(before[-2:-1])
        negative = first.isdigit() and last != "–"
        return not (joined or negative)
    if last == "'":
        return not is_spaced(before[-2:-1]) or bool(_ELISION.search(before[:-1]))
    if last in "&/@+#":
        return not is_spaced(before[-2:-1])
    if last in ".,:":
        return not (first.isdigit() and (before[-2:-1].isdigit() or last == "."))
    return True


def ends_word(text: str, end: int, target: str) -> bool:
    """False if the word or number at the target's end continues after `end`."""
    last, rest = target[-1:], text[end:]
    if not rest:
        return True
    if not last.isalnum():
        return not (is_spaced(rest[0]) and last not in ")]}»\"'") and rest[0] not in "+#"
    if not is_spaced(last):
        return True
    if is_spaced(rest[0]) or rest[0] == "_" or unicodedata.category(rest[0]).startswith("M"):
        return False
    if re.match(r"[+#]|[&/@'][^\W_]|[-‐‑](?:\S|$)|–[^\W_]", rest):
        return False
    if last.isdigit() and _number_goes_on(rest):
        return False
    return not _name_goes_on(rest, target)


def _number_goes_on(rest: str) -> bool:
    """A decimal, a thousands separator, a time of day, a fraction, or a word such as "million"."""
    pattern = rf"[.,:·٫٬]\d|[\s\u202f]\d{{3}}(?!\d)|\s?\d+/\d|[½¼¾]|\s(?:{_SCALES})(?!\w)"
    return re.match(pattern, rest, re.IGNORECASE) is not None


def _name_goes_on(rest: str, target: str) -> bool:
    """An initial, a domain or file name, or a firm such as "Marks & Spencer"."""
    letter = re.search(r"(?:^|[\s.])[^\W\d_]$", target) is not None  # the target ends in a single letter
    if re.match(r"\.[^\W_]", rest) and (letter or not rest[1:2].isupper()):
        return True
    if letter and target[-1:].isupper() and re.match(r"\. (?:[A-Z]\. )*[A-Z]\.", rest):
        return True
    return target[:1].isupper() and re.match(r" & [A-Z]", rest) is not None
