"""The names of subjects and answers in other languages, and an edit's relation asked in them.

`editors/data/names.tsv`: one name a line, English, German, French, Spanish, Italian. A country's German name is in the
dative, its French and Italian names have the word for "of"; ~ stands before the name itself.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib import resources

from editors.constants import assumed
from editors.edit import PLACEHOLDER
from editors.forms.asking import same_answer
from editors.forms.filling import Filled, elided, joined
from editors.forms.relations import LANGUAGES, Relation
from editors.scoring.words import normalise

ALIKE = assumed(
    0.7,
    "Share of common letters (difflib ratio) from which two answers are one name in two languages (Lisbon, Lissabon).",
    "Set by hand on about 30 names of cities; names that differ more are in the table.",
)


_LITTLE_WORDS = {
    "en": "the of is are was what which who where when how in on to do does it and a an",
    "de": "der die das den dem des ist sind war was welche welcher welches wer wo wann wie in im von zu mit man und "
    "ein eine",
    "fr": "le la les de du des est sont était quel quelle qui où quand comment en dans à au et un une que",
    "es": "el la los las de del es son era cuál qué quién dónde cuándo cómo en a al y un una se que",
    "it": "il lo la i gli le di del della è sono era qual quale chi dove quando come in a al e un una che si",
}
_LITTLE = {language: frozenset(words.split()) for language, words in _LITTLE_WORDS.items()}


@dataclass(frozen=True)
class LanguageForm:
    """One wording in one language."""

    language: str
    filled: Filled


def in_languages(relation: Relation, subject: str, place: int) -> list[LanguageForm]:
    """A relation asked about a subject in each language that can name it: wording 0, 1 or 2 of the data.

    The name of a country must be in the table; of other subjects the name stays where it is not.
    """
    forms = []
    for language, texts in relation.languages.items():
        name = _names().get(_bare(subject), {}).get(language)
        if name is None and "country" in relation.kinds:
            continue
        forms.append(LanguageForm(language, _fill(texts[place], name or subject, language)))
    return forms


def in_language(answer: str, language: str) -> str:
    """An answer in a language: from the table, else as it is."""
    name = _names().get(_bare(answer), {}).get(language)
    return answer if name is None else name.partition("~")[2] or name


def names_of(subject: str) -> dict[str, str]:
    """The names of a subject in the languages that the table has it in, without articles."""
    found = _names().get(_bare(subject), {})
    return {language: name.partition("~")[2] or name for language, name in found.items() if name}


def language_of(text: str) -> str:
    """The language of a prompt by its function words: "en" unless another one has more of them."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    count = {language: sum(word in little for word in words) for language, little in _LITTLE.items()}
    # English is first, and wins ties.
    return max(count, key=lambda language: count[language])


def is_country(subject: str) -> bool:
    """Whether a subject is a country of the table."""
    return "~" in _names().get(_bare(subject), {}).get("fr", "")


def same_name(answer: str, other: str, language: str) -> bool:
    """Whether an answer in a language says the same as an English one: by the table, or nearly the same letters."""
    if not answer or not other:
        return False
    if same_answer(_plain(answer), _plain(in_language(other, language))):
        return True
    return SequenceMatcher(None, _plain(answer), _plain(other)).ratio() >= ALIKE


def _fill(template: str, name: str, language: str) -> Filled:
    before, after = template.split(PLACEHOLDER)
    article, marked, bare = name.partition("~")
    if not marked:
        return joined(elided(before, name) if language in ("fr", "it") else before, name, after)
    if before.endswith("de ") and article == "el ":  # Spanish: de + el
        before, article = before[:-1] + "l ", ""
    return joined(before, article + bare, after, skip=len(article))


def _bare(name: str) -> str:
    return normalise(name)


def _plain(text: str) -> str:
    """Letters without accents, in lower case."""
    decomposed = unicodedata.normalize("NFKD", normalise(text))
    return "".join(c for c in decomposed if not unicodedata.combining(c))


@cache
def _names() -> dict[str, dict[str, str]]:
    lines = resources.files("editors").joinpath("data/names.tsv").read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {_bare(row[0]): dict(zip(LANGUAGES, row[1:], strict=True)) for row in rows}
