"""What else can be asked about an edit's subject, in several wordings, so that a detector is silent there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from editors.closed_form.one_subject import subject_groups
from editors.edit import Edit
from editors.forms.filling import Name, fill, name_in
from editors.forms.form import Hold, Material
from editors.forms.relations import Relation, all_relations, are_related
from editors.model.lm import LM

KINDS = (("statement", 3), ("reworded", 2), ("chat", 2))
"""Kinds of forms of another relation that are held, and how many of each at most."""


def with_other_questions(lm: LM, edits: Sequence[Edit], materials: Sequence[Material]) -> list[Material]:
    """The materials with the subject's other relations held, in several wordings.

    A relation whose answer may follow from the edited one ("the continent of X", where its country is edited) is among
    them, unless the model answers it as it answers the edited one: then the two ask the same.
    """
    groups = subject_groups(edits)
    edited = [
        {materials[j].relation for j in range(len(edits)) if groups[j] == groups[i]}
        for i in range(len(edits))
    ]
    plans = [
        list(_others(material, own)) if material.relation else []
        for material, own in zip(materials, edited, strict=True)
    ]
    same = _answered_alike(lm, edits, plans)
    found = []
    for edit, material, plan, alike in zip(edits, materials, plans, same, strict=True):
        taken = {hold.prompt for hold in (*material.held, *material.siblings)}
        more = [
            hold
            for relation, _ in plan
            if relation.name not in alike
            for hold in _holds(edit, relation)
            if hold.prompt not in taken
        ]
        found.append(replace(material, held=(*material.held, *more)))
    return found


def _others(material: Material, edited: set[str]) -> Iterator[tuple[Relation, bool]]:
    """Relations that such a subject has, or that are related to the edited one; and whether they are related to it.

    Left out are the `edited` relations of the subject, and those that only measure.
    """
    own = [relation for relation in all_relations() if relation.name in edited]
    measuring = {hold.relation for hold in material.siblings}
    for relation in all_relations():
        related = any(are_related(relation, each) for each in own)
        if relation.name in edited | measuring or not (related or material.kind in relation.kinds):
            continue
        yield relation, related


def _answered_alike(
    lm: LM, edits: Sequence[Edit], plans: Sequence[Sequence[tuple[Relation, bool]]]
) -> list[set[str]]:
    """For each edit the related relations to which the model's next token is that after the edit's own prompt."""
    related = [[relation for relation, is_related in plan if is_related] for plan in plans]
    texts = [
        [
            lm.prompt(edit.text, chat=edit.is_question),
            *(lm.prompt(fill(r.learned("statement")[0], _name(edit)).text, chat=False) for r in mine),
        ]
        for edit, mine in zip(edits, related, strict=True)
    ]
    prompts = [prompt for mine, asked in zip(texts, related, strict=True) if asked for prompt in mine]
    rows = [(list(lm.encode(prompt)[0]), [0]) for prompt in prompts]
    with torch.no_grad():
        next_tokens = iter(
            [int(logits[0].argmax()) for logits in lm.local.answer_logits(rows)] if rows else []
        )
    found: list[set[str]] = []
    for mine in related:
        own = next(next_tokens) if mine else None
        found.append({relation.name for relation in mine if next(next_tokens) == own})
    return found


def _holds(edit: Edit, relation: Relation) -> Iterator[Hold]:
    for kind, most in KINDS:
        for wording in relation.learned(kind)[:most]:
            filled = fill(wording, _name(edit))
            yield Hold(filled.text, "", filled.span, "relation", relation=relation.name)


def _name(edit: Edit) -> Name:
    return name_in(edit.text, edit.span)
