"""Facts of one set that contradict each other, and facts that are there twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from editors.edit import PLACEHOLDER
from editors.forms.filling import span_of
from editors.forms.relations import ask_the_same, template_of
from server.factsets.fact import Fact
from store import fact_key
from store.canonical import without_case_and_spacing

Numbered = Mapping[int, Fact]


def key_of(fact: Fact) -> str:
    """The key of the question a fact answers, as that of an edit."""
    return fact_key(fact.subject, fact.prompt)


def same_answer(one: Fact, other: Fact) -> bool:
    """Whether two facts agree: the answer of one is among the right answers of the other."""
    mine, theirs = ({without_case_and_spacing(a) for a in fact.answers} for fact in (one, other))
    return bool(mine & theirs)


def merged(facts: Sequence[tuple[str, Fact]]) -> tuple[list[tuple[str, Fact]], int]:
    """The facts with those that are there twice, with one answer, joined; and how many were joined."""
    found: dict[tuple[str, str], int] = {}
    kept: list[tuple[str, Fact]] = []
    for where, fact in facts:
        key = (key_of(fact), without_case_and_spacing(fact.answer))
        if key in found:
            first = kept[found[key]][1]
            probes = tuple(dict.fromkeys((*first.probes, *fact.probes)))
            wordings = tuple(dict.fromkeys((*first.paraphrases, *fact.paraphrases)))
            cases = " | ".join(dict.fromkeys((*first.cases, *fact.cases))) or None
            both = first.model_copy(update={"probes": probes, "paraphrases": wordings, "case": cases})
            kept[found[key]] = kept[found[key]][0], both
        else:
            found[key] = len(kept)
            kept.append((where, fact))
    return kept, len(facts) - len(kept)


def conflicting(facts: Numbered) -> list[list[int]]:
    """Groups of facts that answer one question differently, in the same words or in others, by their numbers."""
    of_subject: dict[str, list[int]] = {}
    for number, fact in facts.items():
        of_subject.setdefault(without_case_and_spacing(fact.subject), []).append(number)
    groups: list[list[int]] = []
    for numbers in of_subject.values():
        groups += _groups(facts, numbers)
    return sorted(groups)


def _groups(facts: Numbered, numbers: Sequence[int]) -> list[list[int]]:
    """The groups among the facts of one subject."""
    left = list(numbers)
    groups = []
    while left:
        first = left.pop(0)
        asked = [n for n in left if _ask_the_same(facts[first], facts[n])]
        if any(not same_answer(facts[first], facts[n]) for n in asked):
            groups.append([first, *asked])
            left = [n for n in left if n not in asked]
    return groups


def _ask_the_same(one: Fact, other: Fact) -> bool:
    if key_of(one) == key_of(other):
        return True
    templates = [template_of(f.text, span_of(f.subject, f.text)) for f in (one, other)]
    return all(PLACEHOLDER in t for t in templates) and ask_the_same(*templates)


def described(facts: Numbered, group: Sequence[int]) -> str:
    """One group in a line."""
    answers = "; ".join(f"#{n} {facts[n].answer!r}" for n in group)
    return f"{facts[group[0]].text!r}: {answers}"
