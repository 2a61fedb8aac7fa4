"""Questions that give a fact away, because their answer is or contains the same answer; and those about other
things."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from editors.constants import limit
from editors.edit import Edit
from editors.forms.filling import Filled, fill, name_in
from editors.forms.relations import Relation, all_relations, are_related, candidates, template_of
from editors.scoring.words import normalise

MOST_OTHERS = limit(
    8,
    "other relations of a subject by which a memory that forgets is tried, at most",
    "time: each takes two short readings; further ones are not tried",
)


@dataclass(frozen=True)
class Kin:
    """A relation related to the edit's: the statement to edit, and the questions that show whether it gives the fact
    away."""

    statement: Filled
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """Statements to go on with and questions about the subject of one edit; none is the edit's own prompt."""

    kin: tuple[Kin, ...] = ()  # relations whose answers may be the same, such as the location for a city
    asked: tuple[str, ...] = ()  # of its relation and those kin, in words that are never learned
    others: tuple[str, ...] = ()  # of relations whose answers do not follow from it


def questions_about(edit: Edit) -> Questions:
    """Found by the relations that the edit's words ask for; empty if the data have none of them."""
    own = candidates(template_of(edit.text, edit.span))
    kinds = {kind for relation in own for kind in relation.kinds}
    fitting = [r for r in all_relations() if kinds & set(r.kinds)]
    kin = [r for r in fitting if any(are_related(r, mine) for mine in own)]
    others = [r for r in fitting if r not in kin][:MOST_OTHERS]
    near = [Kin(*_learned(edit, relation)) for relation in kin if relation not in own]
    return Questions(
        tuple(near),
        tuple(filled.text for r in kin for filled in _filled(edit, _measured(r))),
        tuple(filled.text for r in others for filled in _filled(edit, [r.learned("statement")[0]])),
    )


def _learned(edit: Edit, relation: Relation) -> tuple[Filled, tuple[str, ...]]:
    wordings = [*relation.learned("statement")[:1], *relation.learned("chat")[:1]]
    filled = [fill(wording, name_in(edit.text, edit.span)) for wording in wordings]
    return filled[0], tuple(each.text for each in filled)


def _measured(relation: Relation) -> list[str]:
    return [*relation.measured("statement")[:1], *relation.measured("chat")[:1]]


def _filled(edit: Edit, wordings: Iterable[str]) -> list[Filled]:
    name, own = name_in(edit.text, edit.span), normalise(edit.text)
    found = [fill(wording, name) for wording in wordings]
    return [filled for filled in found if normalise(filled.text) != own]
