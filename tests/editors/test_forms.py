"""The material of an edit: forms to learn and to measure, facts to hold and to measure."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from editors.edit import Edit, Neighbour
from editors.forms.form import Form, Hold
from editors.forms.material import material_for
from tests.families import make

PARIS = Edit(
    subject="France",
    prompt="The capital of {} is",
    target="Lyon",
    holds=(Neighbour(prompt="{} is located on the continent of", answer="Europe"),),
)


def test_the_callers_holds_name_the_subject_by_braces_and_are_held() -> None:
    assert PARIS.holds[0].prompt == "France is located on the continent of"
    (hold,) = [h for h in material_for(make("llama"), PARIS).held if h.source == "caller"]
    assert (hold.prompt, hold.answer, hold.span) == (
        "France is located on the continent of",
        "Europe",
        (0, 6),
    )


def test_the_edits_own_prompt_cannot_be_held() -> None:
    with pytest.raises(ValidationError, match="holds has the edit's own prompt 'The capital of France is'"):
        Edit.model_validate(
            {
                "subject": "France",
                "prompt": "The capital of France is",
                "target": "Lyon",
                "holds": [{"prompt": "The capital of {} is", "answer": "Paris"}],
            }
        )


def test_a_statement_inside_an_answer_follows_the_question_and_keeps_its_span() -> None:
    lm = make("llama")
    form = Form("statement", "The capital of France is", (15, 21), question="Tell me about France.")
    prompt = form.in_model(lm)
    assert prompt.text.endswith("The capital of France is")
    assert "Tell me about France." in prompt.text
    assert prompt.text[prompt.offset :][slice(*(form.span or ()))] == "France"
    assert lm.last_subject_token(prompt, (15, 21)) > 0
    assert not form.chat


def test_questions_and_chat_kinds_go_through_the_chat_template() -> None:
    lm = make("llama")
    request = Form("chat_reworded", "Tell me the capital of France.", (23, 29))
    assert request.chat
    assert request.in_model(lm).offset > 0
    assert Hold("What is the capital of France?", "Paris", (23, 29), "caller").chat
    assert Form("statement", "The capital of France is", (15, 21)).in_model(lm).offset == 0
