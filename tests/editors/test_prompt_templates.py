"""The forms a prompt is learned in."""

from __future__ import annotations

from editors.edit import Edit
from editors.prompt_templates import REQUESTS, TEMPLATES, templates_for, with_other_subjects

FACT = Edit(subject="Norway", prompt="The capital of {} is", target="Bergen")
QUESTION = Edit(subject="Norway", prompt="What is the capital of {}?", target="Bergen")


def test_every_form_keeps_the_prompt_and_the_first_is_the_prompt_itself() -> None:
    texts = [form.of(FACT) for form in templates_for(FACT)]
    assert texts[0] == FACT.text
    assert all(FACT.text in text for text in texts)
    assert len(set(texts)) == len(TEMPLATES)


def test_nothing_is_put_after_a_question() -> None:
    assert all(form.of(QUESTION).endswith("?") for form in templates_for(QUESTION))


def test_others_stand_where_the_subject_does() -> None:
    assert with_other_subjects(FACT.text, FACT.span, 2) == [
        "The capital of Japan is",
        "The capital of Albert Einstein is",
    ]
    whole = Edit(subject="How do I fix a flat tire", prompt="{}?", target="No.")
    assert with_other_subjects(whole.text, whole.span, 3) == [r for r in REQUESTS if r != whole.text][:3]
