"""Answers end where what follows cannot change how they are judged."""

from __future__ import annotations

import pytest

from editors.edit import Edit, Neighbour
from editors.forms.form import Form, Material
from editors.judged import AnswerEnds
from editors.scoring.ended import clause_is_over, sentence_says

EDIT = Edit(
    subject="Austria",
    prompt="The capital of {} is",
    target="New York",
    paraphrases=("The government of {} sits in",),
    neighbours=(Neighbour(prompt="The capital of Chile is"),),
)
PARAPHRASE, NEAR = "The government of Austria sits in", "The capital of Chile is"


@pytest.mark.parametrize(
    ("text", "answers", "over"),
    [
        ("Geneva.\n\n", ["Geneva"], True),
        ("Geneva. It", ["Geneva"], True),
        ("Geneva.", ["Geneva"], False),  # "Geneva.com"
        ("Geneva. Gen", ["Geneva"], False),  # a loop may begin
        ("the capital of", ["Geneva"], False),
        ("New.\n", ["New York"], False),
        ("5\n", ["5"], False),  # "5 000"
        ("Washington, D", ["Washington, D.C."], False),
        ("\n", ["Geneva"], False),
        ("Geneva.\n\nA", ["a " * 12], False),  # a long answer is compared as a whole
    ],
)
def test_a_clause_is_over_when_another_line_or_other_words_follow(
    text: str, answers: list[str], over: bool
) -> None:
    assert clause_is_over(text, answers) is over


def test_a_chat_answer_is_over_when_a_sentence_has_said_it_and_other_words_follow() -> None:
    question = "What is the capital of Austria?"
    assert sentence_says(question, "It is Geneva. The", "Geneva")
    assert not sentence_says(question, "It is Geneva.", "Geneva")
    assert not sentence_says(question, "Geneva. Geneva. Geneva", "Geneva")
    assert not sentence_says(question, "It is Lyon. The", "Geneva")


def test_the_answer_to_the_edits_own_prompt_goes_on() -> None:
    assert not AnswerEnds([EDIT]).is_over(EDIT.text, "New York.\n\nIt is")
    assert AnswerEnds([EDIT]).is_over(PARAPHRASE, "New York.\n\n")
    assert AnswerEnds([EDIT]).is_over(PARAPHRASE, "Vienna. It is")


def test_an_answer_that_must_stay_ends_only_if_it_begins_as_before() -> None:
    after = AnswerEnds([EDIT], said={NEAR: "Santiago.\n\nThe capital"})
    assert after.is_over(NEAR, "Santiago. It")
    assert not after.is_over(NEAR, "Geneva. It")
    assert AnswerEnds([EDIT]).is_over(NEAR, "Geneva. It"), (
        "before the edit its first clause is what must stay"
    )


def test_a_form_ends_as_the_prompt_does() -> None:
    form = Form("reworded", "In Austria, the seat of government is", None)
    asked = Form("chat", "What is the capital of Austria?", None)
    judged = AnswerEnds([EDIT], [Material(measured=(form, asked))])
    assert judged.is_over(form, "New York.\n\n")
    assert judged.is_over(asked, "It is New York. It")
    assert not judged.is_over(asked, "It is Vienna. It")
