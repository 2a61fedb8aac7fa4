"""The shipped facts: well-known ones in several wordings, and ordinary sentences, written for this project.

The learned editors train on them when no data are given, and the second moments start from them.
None of them is among the facts of `benchmarks/data`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from editors.edit import PLACEHOLDER


@dataclass(frozen=True)
class FactGroup:
    """Facts that share their wordings; a wording has `{}` where the subject stands."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]  # (subject, object)


def relations() -> list[FactGroup]:
    """Every relation with its wordings and facts."""
    return [
        FactGroup(r["name"], tuple(r["statements"]), tuple(r["questions"]), tuple(r["facts"].items()))
        for r in _shipped()["relations"]
    ]


def texts() -> list[str]:
    """Ordinary sentences about nothing in particular."""
    shipped: list[str] = _shipped()["texts"]
    return shipped


def sentences() -> list[str]:
    """Every fact once, as a sentence; the wordings of a relation take turns, and so do the relations."""
    by_turn = [
        (i, f"{fill(relation.statements[i % len(relation.statements)], subject)} {answer}.")
        for relation in relations()
        for i, (subject, answer) in enumerate(relation.facts)
    ]
    return [sentence for _, sentence in sorted(by_turn, key=lambda pair: pair[0])]


def fill(template: str, subject: str) -> str:
    """A wording about a subject; a sentence that opens with it opens with a capital."""
    text = template.replace(PLACEHOLDER, subject)
    return text[:1].upper() + text[1:] if template.startswith(PLACEHOLDER) else text


@cache
def _shipped() -> dict[str, Any]:
    text = resources.files("editors").joinpath("data/facts.json").read_text("utf-8")
    shipped: dict[str, Any] = json.loads(text)
    return shipped
