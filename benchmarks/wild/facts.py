"""The facts of `benchmarks/data/wild.json`: false but plausible targets, asked in words that no method learns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.edit import PLACEHOLDER, Edit

DATA = Path(__file__).parent.parent / "data" / "wild.json"
NEIGHBOURS = 4  # other subjects asked for each fact
FORMS = ("statement", "reworded", "chat", "chat_reworded", "language")


@dataclass(frozen=True)
class Asked:
    """One prompt, how it is put to the model, and the answers that are right."""

    prompt: str
    chat: bool
    right: tuple[str, ...]
    before: tuple[str, ...] = ()  # what was right before the edit, where only a known fact is asked for


@dataclass(frozen=True)
class WildFact:
    """One edit and everything it is measured with."""

    relation: str
    edit: Edit
    forms: Mapping[str, tuple[Asked, ...]]
    siblings: tuple[Asked, ...]  # the subject's other facts
    neighbours: tuple[Asked, ...]  # the same relation of subjects that are never edited

    @property
    def asked(self) -> list[Asked]:
        return [*(a for form in self.forms.values() for a in form), *self.siblings, *self.neighbours]


@dataclass(frozen=True)
class Wild:
    """Everything the file holds."""

    facts: tuple[WildFact, ...]
    ability: tuple[Asked, ...]  # ordinary questions
    texts: tuple[str, ...]  # for the perplexity


def load(path: Path = DATA) -> Wild:
    """Read the file. The same file always gives the same facts with the same neighbours."""
    data = json.loads(path.read_text("utf-8"))
    facts = tuple(_fact(data, subject) for subject in data["subjects"] if "edit" in subject)
    ability = tuple(Asked(a["question"], True, tuple(a["answers"])) for a in data["ability"])
    return Wild(facts, ability, tuple(data["texts"]))


def drawn(facts: Sequence[WildFact], n: int, seed: int) -> list[WildFact]:
    """`n` of the facts, the same for the same seed; the kinds of subjects as they come."""
    return random.Random(seed).sample(list(facts), min(n, len(facts)))


def wordings(path: Path = DATA) -> set[str]:
    """Every template that measures: all wordings except the edits' own statements."""
    relations = json.loads(path.read_text("utf-8"))["relations"].values()
    return {w for r in relations for w in (*r["reworded"], r["chat"], *r["chat_reworded"], r["german"])}


def _fact(data: dict[str, Any], subject: dict[str, Any]) -> WildFact:
    name, relation, target = subject["name"], subject["edit"]["relation"], subject["edit"]["target"]
    words = data["relations"][relation]
    german = tuple(data["german"].get(target, [target]))
    true = subject["facts"][relation]
    known = (*true, *(g for answer in true for g in data["german"].get(answer, [answer])))
    says = (target,)
    statement = _fill(words["statement"], name)
    forms = {
        "statement": (Asked(statement, False, says),),
        "reworded": tuple(Asked(_fill(w, name), False, says) for w in words["reworded"]),
        "chat": (Asked(_fill(words["chat"], name), True, says),),
        "chat_reworded": tuple(Asked(_fill(w, name), True, says) for w in words["chat_reworded"]),
        "language": (Asked(_fill(words["german"], subject["german"]), True, (*german, target), known),),
    }
    others = [(r, tuple(answers)) for r, answers in subject["facts"].items() if r != relation]
    return WildFact(
        relation,
        Edit(subject=_named_in(statement, name), prompt=statement, target=target),
        forms,
        _flat(_both(data["relations"][r], name, answers) for r, answers in others),
        _flat(
            _both(words, n["name"], tuple(n["facts"][relation])) for n in _neighbours(data, subject, relation)
        ),
    )


def _neighbours(data: dict[str, Any], subject: dict[str, Any], relation: str) -> list[dict[str, Any]]:
    never = [s for s in data["subjects"] if "edit" not in s and relation in s["facts"]]
    return random.Random(subject["name"]).sample(never, min(NEIGHBOURS, len(never)))


def _both(words: dict[str, Any], name: str, answers: tuple[str, ...]) -> tuple[Asked, Asked]:
    """A fact as a statement and as a chat question."""
    return (
        Asked(_fill(words["statement"], name), False, answers),
        Asked(_fill(words["chat"], name), True, answers),
    )


def _flat(pairs: Iterable[tuple[Asked, ...]]) -> tuple[Asked, ...]:
    return tuple(asked for pair in pairs for asked in pair)


def _fill(template: str, subject: str) -> str:
    text = template.replace(PLACEHOLDER, subject)
    return text[:1].upper() + text[1:] if template.startswith(PLACEHOLDER) else text


def _named_in(prompt: str, name: str) -> str:
    """The subject as it stands in the prompt, without its article."""
    bare = name.removeprefix("the ")
    return bare if bare in prompt else bare[:1].upper() + bare[1:]
