"""The shipped relations: their wordings by kind of subject, and which relation a prompt asks for.

`editors/data/relations.json` and `paraphrases.json` were written for this project. In each list of wordings of the
first the entries at even places may be learned from, those at odd places are only measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from editors.edit import PLACEHOLDER
from editors.forms.wording import asked_noun

KINDS = ("statement", "reworded", "chat", "chat_reworded")
LANGUAGES = ("de", "fr", "es", "it")
CONTINENTS = (
    "Africa", "America", "Antarctica", "Asia", "Australia", "Europe", "North America", "Oceania", "South America",
)  # fmt: skip
_ARTICLE = re.compile(r" (\[(the|a)\]|the|a|an)$")
_YEAR = re.compile(r"\d{3,4}")
_INVERSE = re.compile(
    r"^\{\},?( that| which)?( is| was| are| were)? (the|an?) "
    r"(?!(\w+ )?(product|part|citizen|native|member|creation|kind|type|species|category|subclass) )"
    r"(?:(?! (in|on|at|from|near) )[^{}])* of$"
)


@dataclass(frozen=True, eq=False)
class Relation:
    """One relation. A wording has {} where the subject stands, and [the] or [a] for an article the answer may have."""

    name: str
    kinds: tuple[str, ...]  # of subject
    cue: re.Pattern[str]  # found in prompts that ask for it, in lower case with {} for the subject
    related: frozenset[
        str
    ]  # relations whose answers may follow from this one's, so they are not held with it
    wordings: dict[str, tuple[str, ...]]  # by kind of form
    paraphrases: tuple[
        str, ...
    ]  # more wordings, indirect ones among them, that only a judge of relations learns from
    languages: dict[str, tuple[str, ...]]  # statement, question to learn, question to measure
    year: bool  # its answers are years
    several: bool  # more than one answer may be right
    broad: bool  # covers facts that differ, each asked for in its own words

    def learned(self, kind: str) -> Sequence[str]:
        """The wordings of a kind of form that may be learned from."""
        return self.wordings[kind][::2]

    def measured(self, kind: str) -> Sequence[str]:
        """The wordings of a kind of form that are only measured."""
        return self.wordings[kind][1::2]


def template_of(text: str, span: tuple[int, int] | None) -> str:
    """A text with {} in place of its subject."""
    return text if span is None else text[: span[0]] + PLACEHOLDER + text[span[1] :]


def candidates(template: str, answer: str = "") -> list[Relation]:
    """The relations that a prompt with {} for its subject may ask for; more than one where only the subject decides.

    A wording of the data decides, else the cue that covers most of the prompt. A number for an `answer` asks for
    relations to a year only, any other answer for none of those. Where a thing is, with a continent for an answer, asks
    for its continent too.
    """
    found = _by_words(template, answer)
    if answer in CONTINENTS and any(r.name == "location" for r in found):
        found += [r for r in all_relations() if r.name == "continent"]
    return found


def _by_words(template: str, answer: str) -> list[Relation]:
    """The relations that the words of a prompt name, and that have such answers."""
    lower = template.lower()
    fitting = [r for r in all_relations() if not answer or r.year == bool(_YEAR.fullmatch(answer.strip()))]
    if exact := [r for r in fitting if wording_key(template) in _keys(r)]:
        return exact
    found = [(len(match.group()), r) for r in fitting if (match := r.cue.search(lower))]
    if _INVERSE.match(lower):  # "{} is the author of" asks for a work, not for an author
        found = [(length, r) for length, r in found if r.name == "capital_of"]
    longest = max((length for length, _ in found), default=0)
    return [r for length, r in found if length == longest]


def is_worded(template: str) -> bool:
    """Whether a prompt with {} for its subject is one of the data's own wordings, of any relation."""
    key = wording_key(template)
    return any(key in _keys(r) for r in all_relations())


def ask_the_same(template: str, other: str) -> bool:
    """Whether two prompts with {} for the same subject ask, by their words, for one fact that has one answer.

    By the relation of the data, where only one answer can be right, else by the noun that both ask for ("{}'s refund
    policy is", "The refund policy of {} is"). Relations that cover several facts (a leader may be a king or a
    minister) must be asked for in the same words.
    """
    nouns = asked_noun(template), asked_noun(other)
    if nouns[0] and nouns[0] == nouns[1]:
        return True
    shared = {r for r in candidates(template) if not r.several} & set(candidates(other))
    return any(not r.broad or cued(r, template) == cued(r, other) for r in shared)


def cued(relation: Relation, template: str) -> str:
    """The part of a prompt that asks for a relation, or its name for one of the data's own wordings."""
    match = relation.cue.search(template.lower())
    return match.group() if match else relation.name


def are_related(one: Relation, other: Relation) -> bool:
    """Whether they are the same relation, or one's answer may follow from the other's."""
    return one.name == other.name or other.name in one.related or one.name in other.related


def relations_of_kind(kind: str) -> list[Relation]:
    """The relations that a kind of subject can have, in the order of the data."""
    return [r for r in all_relations() if kind in r.kinds]


@cache
def all_relations() -> tuple[Relation, ...]:
    """Every relation of the data."""
    shipped = _shipped("relations")
    paraphrases = _shipped("paraphrases")["paraphrases"]
    return tuple(
        Relation(
            name=r["name"],
            kinds=tuple(r["kinds"]),
            cue=re.compile(rf"(?<!\w)(?:{r['cue']})"),  # "eats" is not in "creates"
            related=frozenset(r["related"]),
            wordings={kind: tuple(r[kind]) for kind in KINDS},
            paraphrases=tuple(text for texts in paraphrases[r["name"]].values() for text in texts),
            languages={language: tuple(r[language]) for language in LANGUAGES if language in r},
            year=r.get("answer") == "year",
            several=r.get("answer") == "several",
            broad=r.get("broad", False),
        )
        for r in shipped["relations"]
    )


def _shipped(name: str) -> Any:
    return json.loads(resources.files("editors").joinpath(f"data/{name}.json").read_text("utf-8"))


@cache
def _keys(relation: Relation) -> frozenset[str]:
    return frozenset(wording_key(text) for texts in relation.wordings.values() for text in texts)


def wording_key(template: str) -> str:
    """A key that is equal for wordings that differ only in case, in the last article or in the final mark."""
    return _ARTICLE.sub("", template.rstrip(" ?.!").lower())
