"""The subject's other facts: which relations to ask, which answers to trust, what to hold and what only to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from editors.constants import DEFAULT_MODEL, limit, tuned
from editors.edit import Edit
from editors.forms.asking import Answer, Reading, same_answer
from editors.forms.filling import Filled, Name, fill, span_of
from editors.forms.form import Hold
from editors.forms.relations import Relation, are_related, candidates, relations_of_kind, template_of

ASKED = limit(
    12,
    "other relations that are asked for one subject, at most",
    "time: they are read in one batch; further ones are not asked",
)
ROWS = limit(
    1200,
    "other relations that are asked in one call, all its subjects together, at most",
    "time: about a minute on two cores; of more subjects, each is asked fewer",
)
KEPT = limit(
    6,
    "the surest answers of one subject that are kept, at most",
    "time: each is asked again in every measurement; less sure ones are left out",
)
SURE = tuned(
    0.3,
    "least probability of an answer that counts as known to the model",
    models=DEFAULT_MODEL,
    command="python -m benchmarks.forms",
    figure="of 200 shipped facts, asked inside an answer, 108 count as known and 79% of them are right; as bare "
    "statements 54 and 69%; at 0.1 143 and 71%, at 0.5 79 and 84%",
)
EMPTY = frozenset(
    "the a an not one called located also known their its his her it this that in on of by to from as at very most now "  # noqa: SIM905
    "still often usually considered based born named two three being written used made part".split()
)
"""First words that say nothing about the fact."""


@dataclass(frozen=True)
class Question:
    """One other relation of a subject, as a statement to be answered."""

    relation: Relation
    filled: Filled
    name: Name  # of the subject


def questions(name: Name, kind: str, edited: Sequence[Relation], most: int) -> list[Question]:
    """The relations of a kind of subject that may be asked, without those that are edited or follow from those."""
    return [
        Question(relation, fill(relation.wordings["statement"][0], name), name)
        for relation in relations_of_kind(kind)
        if not any(are_related(relation, each) for each in edited)
    ][:most]


def surest(reading: Reading, rows: Sequence[int]) -> list[int]:
    """The rows whose first word is sure and says something, the surest first, at most KEPT."""
    fit = [
        i
        for i in rows
        if reading.sure[i] >= SURE
        and (word := reading.first_word(i).lower())
        and word[0].isalnum()
        and word not in EMPTY
    ]
    return sorted(fit, key=lambda i: -reading.sure[i])[:KEPT]


def facts(
    about: str, asked: Sequence[tuple[Question, Answer]], known: Sequence[Hold], previous: str
) -> list[list[Hold]]:
    """The facts of a subject that are known, each as its holds (statement, inside an answer, chat), surest first.

    What the ledger knows comes first; a relation of the data that it knows is not taken again. An answer that is
    also the edit's previous one is left out: it may be the same fact in other words. `about`: the question whose
    answer the statements were.
    """
    taken = {hold.relation for hold in known if hold.relation}
    found = [[hold] for hold in known]
    for question, answer in sorted(asked, key=lambda pair: -pair[1].probability):
        if question.relation.name in taken or not _trusted(answer, question):
            continue
        if not (previous and same_answer(answer.fact, previous)):
            found.append(_forms_of(question, answer, about))
    return found


def divided(facts: Sequence[Sequence[Hold]]) -> tuple[list[Hold], list[Hold]]:
    """Facts to hold, and facts only to measure: of every three, the second is measured. Active edits are all held."""
    edits = [hold for fact in facts for hold in fact if hold.source == "ledger"]
    others = [fact for fact in facts if fact[0].source != "ledger"]
    held = [hold for i, fact in enumerate(others) if i % 3 != 1 for hold in fact]
    measured = [hold for i, fact in enumerate(others) if i % 3 == 1 for hold in fact]
    return [*edits, *held], measured


def with_relation(hold: Hold) -> Hold:
    """A known fact with the name of its relation, where the data have it."""
    found = candidates(template_of(hold.prompt, hold.span), hold.answer)
    return replace(hold, relation=found[0].name) if found and not hold.relation else hold


def callers(edit: Edit) -> list[Hold]:
    """The facts that the caller of an edit wants held."""
    return [Hold(n.prompt, n.answer or "", span_of(edit.subject, n.prompt), "caller") for n in edit.holds]


def _trusted(answer: Answer, question: Question) -> bool:
    """Sure, short, and saying more than its question does."""
    words = answer.fact.lower().split()
    asked = question.filled.text.lower().split()
    return (
        answer.probability >= SURE
        and 0 < len(words) <= 4
        and words[0] not in EMPTY
        and not set(words) <= set(asked)
        and question.name.subject.lower() not in answer.fact.lower()
    )


def _forms_of(question: Question, answer: Answer, about: str) -> list[Hold]:
    relation, statement = question.relation, question.filled
    chat = fill(relation.wordings["chat"][0], question.name)
    said = answer.text[: answer.text.find(answer.fact) + len(answer.fact)].strip()
    plain = Hold(statement.text, answer.fact, statement.span, "relation", relation=relation.name)
    return [
        replace(plain, said=said, question=about),
        replace(plain, prompt=chat.text, span=chat.span, said=f"{statement.text} {said}"),
        plain,
    ]
