"""Texts are compared in one normal form, and an error says which character differs."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from editors.edit import Edit
from editors.normal_form import difference, normal_form, spelled_in
from store.canonical import fact_key
from store.canonical import normal_form as of_the_ledger

TEXT = st.text(st.sampled_from("ab é\u0301e'’ʼ\u00a0\u2009 \u200bCôte d"), max_size=30)


@given(TEXT)
def test_the_ledger_and_the_editors_have_the_same_normal_form(text: str) -> None:
    assert normal_form(text) == of_the_ledger(text)


@given(TEXT)
@example("e\u200b\u0301")
def test_a_normal_form_is_its_own_normal_form(text: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(text)


@pytest.mark.parametrize(
    ("subject", "spelled"),
    [
        ("Côte d'Ivoire", "Côte d’Ivoire"),
        ("Co\u0302te d'Ivoire", "Côte d’Ivoire"),
        ("New York", "New\u00a0York"),
        ("New  York", "New York"),
        ("Zero Width", "Zero\u200b Width"),
    ],
)
def test_a_subject_in_another_spelling_is_found_in_its_prompt(subject: str, spelled: str) -> None:
    edit = Edit(subject=subject, prompt=f"The capital of {spelled} is", target="Rome")
    assert edit.subject == spelled
    assert edit.span == (15, 15 + len(spelled))
    assert spelled_in(edit.prompt, subject) == spelled
    assert fact_key(subject, "The capital of {} is") == fact_key(spelled, "The capital of {} is")


@pytest.mark.parametrize(
    ("prompt", "subject", "named"),
    [
        ("The capital of Cote d'Ivoire is", "Côte d'Ivoire", "U+006F LATIN SMALL LETTER O"),
        ("The capital of Вelarus is", "Belarus", "U+0412 CYRILLIC CAPITAL LETTER VE"),
    ],
)
def test_an_error_names_the_character_that_differs(prompt: str, subject: str, named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Edit(subject=subject, prompt=prompt, target="Rome")
    message = str(caught.value)
    assert "does not contain the subject" in message
    assert named in message


def test_nothing_alike_is_not_explained() -> None:
    assert difference("The capital of France is", "Zanzibar") == ""
