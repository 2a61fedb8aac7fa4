"""Put a subject into a wording, with the articles that its answer needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from editors.edit import PLACEHOLDER, ends_in_word

_SLOT = re.compile(r" \[(the|a)\]")
_ENDS_IN_ARTICLE = re.compile(r"\b(the|an?)$", re.IGNORECASE)
_ARTICLE_FIRST = re.compile(r"(the|an?|la|le|l'|el|der|die|das|il) ", re.IGNORECASE)
_AFTER_NAME = re.compile(
    r"$|[?.,'’]| (is|are|was|were|has|had|in|of|on|by|to|from|and|can|does|did)\b|[^\w\s]"
)
_VOWEL = tuple("aeiouhàâéèêëîïôûAEIOUHÀÂÉÈÊËÎÏÔÛ")


@dataclass(frozen=True)
class Filled:
    """A wording about a subject, with the characters where the subject stands."""

    text: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Name:
    """A subject, and the article that its name takes in a sentence."""

    subject: str
    article: str = ""


def fill(template: str, name: Name, answer: str = "", prompt: str = "") -> Filled:
    """A wording about a subject; its [the] or [a] stays if the answer has no article of its own.

    `prompt` is the edit's own: one that ends in an article, or could have and does not, shows how its target is
    written. A name that begins with an article gets a capital at the beginning of a sentence.
    """
    before, after = _with_article(template, answer, prompt).split(PLACEHOLDER)
    return joined(before, name.article + name.subject, after, skip=len(name.article))


def name_in(text: str, span: tuple[int, int]) -> Name:
    """How a prompt names its subject: with the article before it, where that belongs to the name.

    "The Eiffel Tower is" has the name "the Eiffel Tower"; in "The Apple founder is" the article is not the name's.
    """
    subject, after = text[span[0] : span[1]], text[span[1] :]
    if re.search(r"(^|\s)the $", text[: span[0]], re.IGNORECASE) and _AFTER_NAME.match(after):
        return Name(subject, "the ")
    return Name(subject)


def span_of(subject: str, text: str) -> tuple[int, int] | None:
    """Where the subject stands in a text as a whole word, the last time, or None where it does not.

    Its first letter may be a capital: "The Eiffel Tower is" names "the Eiffel Tower".
    """
    words = rf"(?i:{re.escape(subject[:1])}){re.escape(subject[1:])}"
    if ends_in_word(subject):
        words = rf"(?<!\w){words}(?!\w)"
    found = list(re.finditer(words, text))
    return found[-1].span() if found else None


def joined(before: str, subject: str, after: str, skip: int = 0) -> Filled:
    """Text before, a subject, text after; `skip` characters of the subject are an article and no part of the span."""
    if not before and _ARTICLE_FIRST.match(subject):
        subject = subject[0].upper() + subject[1:]
    start = len(before) + skip
    return Filled(before + subject + after, (start, len(before) + len(subject)))


def elided(before: str, subject: str) -> str:
    """French "de " and "que " before a vowel: "d'", "qu'"."""
    if subject.startswith(_VOWEL) and before.endswith((" de ", " que ")):
        return before[:-2] + "'"
    return before


def _with_article(template: str, answer: str, prompt: str) -> str:
    slot = _SLOT.search(template)
    if slot is None:
        return template
    bare = _SLOT.sub("", template)
    if _ARTICLE_FIRST.match(answer) or (prompt and not _ENDS_IN_ARTICLE.search(prompt) and _plain(answer)):
        return bare
    article = slot[1] if slot[1] == "the" else "an" if answer[:1].lower() in tuple("aeio") else "a"
    return _SLOT.sub(f" {article}", template)


def _plain(answer: str) -> bool:
    """True for an answer that stands without an article, such as a name."""
    return answer[:1].isupper()
