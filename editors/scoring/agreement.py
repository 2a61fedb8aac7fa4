"""Whether an answer agrees with the right one though it has other words: less or more of a name, another inflection.

"Swiss franc" agrees with "franc", "euros" with "euro", "Reykjavik" with "Reykjavík", "the city of Rome" with "Rome".
For checking what a model believes. Edits are judged by `answered_with`, which is stricter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from editors.edit import is_question
from editors.scoring.assertion import sentences
from editors.scoring.looping import is_looping
from editors.scoring.verdict import answered_with, is_long
from editors.scoring.words import is_spaced, short_answer, tidy

STEM = 3  # letters that an adjective shares with the name it comes from ("Swiss", "Switzerland")
INFLECTED = 4  # letters from which on a word may have an ending
_ENDINGS = ("", "s", "es", "e", "n", "en", "er", "'s")
_SMALL = frozenset(
    """a an the of in on at to for from by is was are were der die das den dem des ein eine le la les l un une el los
    las il lo gli i o os as em de du di da del della von vom zu""".split()  # noqa: SIM905
)
_KINDS = frozenset(
    """city town village country state nation island continent region province republic kingdom name language currency
    company university official capital national""".split()  # noqa: SIM905
)
_NEGATED = re.compile(r"\b(?:not|no longer|never|neither|nor|\w+n't|nicht|kein\w*|pas|ne)\b", re.IGNORECASE)
_NATIONS = {
    "american": "united states",
    "us": "united states",
    "u.s": "united states",
    "british": "united kingdom",
    "english": "england",
    "danish": "denmark",
    "dutch": "netherlands",
    "french": "france",
    "irish": "ireland",
    "welsh": "wales",
    "filipino": "philippines",
    "philippine": "philippines",
    "emirati": "united arab emirates",
}
"""Adjectives that share too few letters with their country."""


def agrees(prompt: str, answer: str, right: str) -> bool:
    """Whether an answer says the right answer, in these words or in near ones."""
    if answered_with(prompt, answer, right):
        return True
    if is_question(prompt) or is_long(right) or is_looping(answer) or not all(map(_spaced, (answer, right))):
        return False
    if any(character.isdigit() for character in right):  # a number has no near words
        return False
    clause = short_answer(sentences(tidy(answer))[0].text)
    if _NEGATED.search(clause):
        return False
    said, wanted = _core(prompt, clause), _core(prompt, right)
    if not wanted:
        return False
    return len(said) >= len(wanted) and all(map(same_word, said, wanted))


def says_more(prompt: str, answer: str, right: str) -> bool:
    """Whether an answer ends its first clause with the right answer after words of its own ("US dollar" for "dollar").

    Such an answer may mean something else.
    """
    if is_question(prompt) or not _spaced(answer):
        return False
    said, wanted = _words(short_answer(tidy(answer))), _words(right)
    return len(said) > len(wanted) > 0 and all(map(same_word, said[-len(wanted) :], wanted))


def same_word(one: str, other: str) -> bool:
    """Whether two words are one but for accents, case and a common ending."""
    one, other = _bare(one), _bare(other)
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    if short[-1:].isdigit() or len(short) < INFLECTED:
        return False
    return any(long == short + ending for ending in _ENDINGS) or (
        long.endswith("ies") and long[:-3] + "y" == short
    )


def _core(prompt: str, text: str) -> list[str]:
    """The words of a text that say something which the prompt has not said yet."""
    known = [_bare(word) for word in _words(prompt)]
    asked = " ".join(known)
    return [word for word in _words(text) if not _from_prompt(_bare(word), known, asked)]


def _from_prompt(word: str, known: Sequence[str], asked: str) -> bool:
    if word in _SMALL or word in _KINDS or word in known or _NATIONS.get(word, "\n") in asked:
        return True
    return len(word) > STEM and any(
        len(k) > STEM and k[:STEM] == word[:STEM] for k in known if k not in _KINDS
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:[-.'][^\W_]+)*", text)


def _bare(word: str) -> str:
    """A word in lower case without accents."""
    return "".join(c for c in unicodedata.normalize("NFD", word.casefold()) if not unicodedata.combining(c))


def _spaced(text: str) -> bool:
    """True for a text of a script that puts spaces between its words."""
    return all(is_spaced(c) for c in text if c.isalpha())
