"""Shipped facts that a model knows, as edits to try: what a calibration is measured with."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import zip_longest

from editors.constants import limit
from editors.edit import Edit, Neighbour, Probe
from editors.facts import FactGroup, fill, relations
from editors.measure import ANSWER_TOKENS, ask
from editors.model.lm import LM
from editors.scoring import answered_with

WORDINGS = 2  # other wordings of a fact, which an edit does not learn from
NEIGHBOURS = 2  # other subjects' answers to the same question
SIBLINGS = 2  # other facts of the same subject
ASKED = limit(
    12,
    "facts of a relation that are asked to find those a model knows, at most",
    "time: of the others it is not found out",
)


def known_edits(lm: LM, count: int, seed: int, report: Callable[[float, str], None]) -> list[Edit]:
    """Up to `count` edits of facts that the model knows, of many relations in turn.

    Each has another answer of its relation as the target, other wordings as paraphrases, as neighbours the same
    question about other subjects, and as `portability` other facts of its own subject. The model answers all of them
    rightly.
    """
    chance = random.Random(seed)
    every = relations()
    chance.shuffle(every)
    known: dict[str, dict[str, str]] = {}  # relation -> subject -> answer
    for n, relation in enumerate(every):
        report(n / len(every), f"asking what the model knows: {relation.name}")
        known[relation.name] = _known(lm, relation, chance)
    by_relation = [_edits(relation, known, every, chance) for relation in every]
    in_turn = [edit for turn in zip_longest(*by_relation) for edit in turn if edit is not None]
    seen: set[str] = set()
    picked = []
    for edit in in_turn:  # a subject once: edits of one batch must not be each other's neighbours
        if edit.subject.casefold() not in seen:
            seen.add(edit.subject.casefold())
            picked.append(edit)
    return picked[:count]


def _known(lm: LM, relation: FactGroup, chance: random.Random) -> dict[str, str]:
    """The subjects, among these, for which the model answers the relation's first wording rightly."""
    facts = list(relation.facts)
    picked = chance.sample(facts, min(ASKED, len(facts)))
    prompts = {subject: fill(relation.statements[0], subject) for subject, _ in picked}
    said = ask(lm, list(prompts.values()), ANSWER_TOKENS)
    return {s: answer for s, answer in picked if answered_with(prompts[s], said[prompts[s]], answer)}


def _edits(
    relation: FactGroup, known: dict[str, dict[str, str]], every: list[FactGroup], chance: random.Random
) -> list[Edit]:
    """Every second known fact of a relation as an edit; the others serve as neighbours."""
    mine = known[relation.name]
    answers = sorted({answer for _, answer in relation.facts})
    first, *rest = relation.statements
    edits = []
    for subject in list(mine)[::2]:
        others = [s for s in list(mine)[1::2] if mine[s] != mine[subject]]
        targets = [a for a in answers if a != mine[subject]]
        prompt = fill(first, subject)
        if not rest or not others or not targets or subject not in prompt:
            continue
        near = [(fill(first, s), mine[s]) for s in chance.sample(others, min(NEIGHBOURS, len(others)))]
        same = [
            (fill(r.statements[0], subject), known[r.name][subject])
            for r in every
            if r.name != relation.name and subject in known[r.name]
        ]
        edits.append(
            Edit(
                subject=subject,
                prompt=prompt,
                target=chance.choice(targets),
                previous=mine[subject],
                paraphrases=tuple(fill(wording, subject) for wording in rest[:WORDINGS]),
                neighbours=tuple(Neighbour(prompt=p, answer=a) for p, a in near),
                portability=tuple(Probe(prompt=p, answer=a) for p, a in same[:SIBLINGS]),
            )
        )
    return edits
