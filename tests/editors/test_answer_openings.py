"""Chat answers that are taught to begin as a statement of the fact does."""

from __future__ import annotations

from functools import cache

import torch

from editors.closed_form import answer_openings
from editors.closed_form.answer_openings import (
    AnswerOpening,
    answer_opening,
    probabilities,
    with_answers,
)
from editors.closed_form.relation_texts import RelationTexts, relation_texts, with_others
from editors.edit import Edit
from editors.forms.form import Form, Material
from editors.forms.material import material_for
from editors.model.lm import LM
from tests.families import make

EDIT = Edit(subject="Peru", prompt="The capital of {} is", target="Quito")


@cache
def _material() -> Material:
    return material_for(make("llama"), EDIT)


@cache
def _texts(lm: LM) -> tuple[AnswerOpening, RelationTexts, Material]:
    material = _material()
    opening = answer_opening(lm, EDIT, material)
    assert opening is not None
    (texts,) = relation_texts(lm, [EDIT], [with_others(EDIT, material)], 1)
    return opening, texts, material


def test_the_statement_is_the_one_of_which_least_must_be_taught_first_of_all_before_the_subject() -> None:
    lm = make("llama")
    opening, _, material = _texts(lm)
    own = opening.questions[: sum(form.chat and form.language == "en" for form in material.learned)]
    said = [f for f in material.learned if f.span and not f.chat and not f.question and f.language == "en"]
    tried = [Form("statement", EDIT.text, EDIT.span), *said][: answer_openings.STATEMENTS]
    efforts = {}
    for form in tried:
        assert form.span is not None
        ids, named = (
            lm.answer_ids(lm.prompt("Is it?"), text) for text in (form.prompt, form.prompt[: form.span[1]])
        )
        efforts[tuple(ids)] = answer_openings._effort(probabilities(lm, own, ids), len(named))
    assert len(efforts) > 1
    assert efforts[opening.statement] == min(efforts.values())
    likely = torch.tensor([[0.9, 0.4, 0.9, 0.9]])
    assert answer_openings._effort(likely, 2)[:2] == (1, 1)
    assert answer_openings._effort(likely, 1)[:2] == (0, 1)


def test_the_end_of_the_statement_is_moved_in_an_answer_and_no_text_is_moved_and_held() -> None:
    lm = make("llama")
    opening, texts, _ = _texts(lm)
    joined = with_answers(texts, opening)
    assert (*opening.questions[0], *opening.statement) in joined.moved
    assert not set(joined.moved) & {text.ids for text in joined.held}
    assert with_answers(texts, None) == texts


def test_an_edit_without_a_known_question_has_no_answer_to_teach() -> None:
    assert answer_opening(make("llama"), EDIT, Material()) is None
