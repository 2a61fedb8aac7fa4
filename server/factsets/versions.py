"""A new version of a set: which facts are new, which changed, which are gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.factsets.conflicts import key_of
from server.factsets.fact import Fact
from store import FactRecord
from store.canonical import without_case_and_spacing


@dataclass
class Step:
    """What leads from one version to the next."""

    facts: dict[int, Fact]  # the whole set afterwards, by number
    added: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    was: dict[int, Fact] = field(default_factory=dict)  # the changed ones, before

    @property
    def put(self) -> dict[int, Fact]:
        """What must be written."""
        return {n: self.facts[n] for n in (*self.added, *self.changed)}


def step(old: Iterable[FactRecord], new: Sequence[Fact], last: int, keep: bool) -> Step:
    """The step from the stored facts to `new`; with `keep`, facts that are not given stay.

    A fact keeps its number: it is found by its question and answer, else by its question alone. `last` is the
    greatest number ever used in the set.
    """
    before = {record.number: Fact.model_validate(record.fact) for record in old}
    exact, asked = _index(before)
    numbers: list[int | None] = [None] * len(new)
    taken: set[int] = set()
    for find in (exact, asked):
        for i, fact in enumerate(new):
            if numbers[i] is None:
                key = _exact(fact) if find is exact else key_of(fact)
                found = next((n for n in find.get(key, ()) if n not in taken), None)
                if found is not None:
                    numbers[i] = found
                    taken.add(found)
    result = Step({})
    for fact, number in zip(new, numbers, strict=True):
        if number is None:
            last += 1
            result.added.append(last)
            result.facts[last] = fact
            continue
        result.facts[number] = fact
        if fact != before[number]:
            result.changed.append(number)
            result.was[number] = before[number]
    if keep:
        result.facts = {n: f for n, f in before.items() if n not in result.facts} | result.facts
    else:
        result.removed = sorted(before.keys() - result.facts.keys())
    result.facts = dict(sorted(result.facts.items()))
    return result


def _exact(fact: Fact) -> str:
    return f"{key_of(fact)} {without_case_and_spacing(fact.answer)}"


def _index(facts: dict[int, Fact]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    exact: dict[str, list[int]] = {}
    asked: dict[str, list[int]] = {}
    for number, fact in facts.items():
        exact.setdefault(_exact(fact), []).append(number)
        asked.setdefault(key_of(fact), []).append(number)
    return exact, asked
