"""Training records of the learned editors: one fact to change, what must change with it, and what must not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from editors.constants import assumed, limit
from editors.errors import InvalidEdit
from editors.facts import FactGroup, fill

PARAPHRASES = limit(
    3,
    "paraphrases of one training record, at most",
    "time: a training draws two of them in each step; further ones are never read",
)
NEIGHBOURS = limit(
    3,
    "neighbours of one training record, at most",
    "time: a training draws two of them in each step; further ones are never read",
)
OTHER_FACTS = limit(
    2,
    "prompts about the same subject in one training record, at most",
    "time: few subjects have more relations; further ones are never read",
)
MIXED_SHARE = assumed(
    0.12,
    "share of records whose wordings include questions; the others have statements alone",
    "evaluations mostly ask by statements",
)
SAME_WORDING = assumed(
    0.75,
    "share of neighbours asked in the wording of the record's own prompt",
    "such a neighbour shares most with the edit, so it is the hardest to keep",
)


@dataclass(frozen=True)
class Record:
    """One training example; every text is a prompt with its subject filled in."""

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()  # prompts about other subjects, same relation where known
    others: tuple[str, ...] = ()  # other prompts about the same subject


def split_by_subject(records: Sequence[Record], most: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation records with no subject in common.

    Args:
        most: validation records at most; never more than a fifth of all.

    Raises InvalidEdit when one of the two would be empty.
    """
    subjects = sorted({r.subject for r in records})
    random.Random(seed).shuffle(subjects)
    wanted = min(most, len(records) // 5)
    by_subject: dict[str, list[Record]] = {}
    for r in records:
        by_subject.setdefault(r.subject, []).append(r)
    validation: list[Record] = []
    held_out: set[str] = set()
    for subject in subjects:
        if len(validation) >= wanted:
            break
        validation += by_subject[subject]
        held_out.add(subject)
    train = [r for r in records if r.subject not in held_out]
    if not train or not validation:
        raise InvalidEdit(f"{len(records)} records are too few to train and validate with; give at least 20")
    return train, validation[: max(wanted, 1)]


def records_of_relations(relations: Sequence[FactGroup], seed: int) -> list[Record]:
    """One record per fact: its prompt in a random wording, a new answer of the same relation, and neighbours."""
    rng = random.Random(seed)
    relations_of: dict[str, list[tuple[FactGroup, str]]] = {}
    for relation in relations:
        for subject, _ in relation.facts:
            relations_of.setdefault(subject, []).append((relation, subject))
    return [
        record
        for relation in relations
        for fact in relation.facts
        if (record := _record_of(relation, fact, relations_of[fact[0]], rng)) is not None
    ]


def _record_of(
    relation: FactGroup,
    fact: tuple[str, str],
    same_subject: Sequence[tuple[FactGroup, str]],
    rng: random.Random,
) -> Record | None:
    """The record of one fact; None when the relation has no other answer or no other subject."""
    subject, truth = fact
    answers = sorted({answer for _, answer in relation.facts} - {truth})
    other_subjects = [s for s, _ in relation.facts if s != subject]
    if not answers or not other_subjects:
        return None
    wordings = list(relation.statements)
    if relation.questions and (rng.random() < MIXED_SHARE or len(wordings) < 2):
        wordings += relation.questions
    wording, *rest = rng.sample(wordings, len(wordings))
    near = rng.sample(other_subjects, min(NEIGHBOURS, len(other_subjects)))
    return Record(
        subject,
        fill(wording, subject),
        rng.choice(answers),
        tuple(fill(t, subject) for t in rest[:PARAPHRASES]),
        tuple(fill(wording if rng.random() < SAME_WORDING else rng.choice(wordings), s) for s in near),
        tuple(fill(rng.choice(r.statements), s) for r, s in same_subject if r is not relation)[:OTHER_FACTS],
    )
