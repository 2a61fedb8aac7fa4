"""The request: every field is validated, and the subject is found where a reader would find it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from editors.edit import MAX_CHARS, Edit, Neighbour, Probe, is_question

FACT: dict[str, Any] = {"subject": "France", "prompt": "The capital of France is", "target": "Rome"}
words = st.text(st.characters(whitelist_categories=("Lu", "Ll", "Lo", "Nd")), min_size=1, max_size=12)


def edit(**fields: Any) -> Edit:
    return Edit(**FACT | fields)


def test_a_placeholder_stands_for_the_subject() -> None:
    filled = edit(prompt="The capital of {} is")
    assert filled.text == "The capital of France is"
    assert filled.text[slice(*filled.span)] == "France"


def test_a_subject_written_out_is_found() -> None:
    assert edit().span == (15, 21)


def test_the_last_occurrence_of_a_repeated_subject_is_the_subject() -> None:
    repeated = edit(prompt="France is a country, and the capital of France is")
    assert repeated.span[0] == repeated.text.rindex("France")


def test_the_placeholder_wins_over_other_occurrences() -> None:
    marked = edit(prompt="{} is large. The capital of France is")
    assert marked.span == (0, 6)


def test_a_whole_word_wins_over_a_later_part_of_a_word() -> None:
    inside = edit(subject="Iran", prompt="The capital of Iran, where Iranians live, is")
    assert inside.text[slice(*inside.span)] == "Iran"
    assert inside.span[0] == 15


def test_a_part_of_a_word_is_taken_when_no_whole_word_is_there() -> None:
    assert edit(subject="Fran", prompt="The capital of France is").span == (15, 19)


@pytest.mark.parametrize("subject", ["Türkiye", "São Tomé", "日本", "😀 Land", "Россия", "C++", "a.b*(c)"])
def test_subjects_of_any_script_are_found(subject: str) -> None:
    found = edit(subject=subject, prompt=f"The capital of {subject} is")
    assert found.text[slice(*found.span)] == subject


@given(before=words, subject=words, after=words)
def test_the_span_always_reads_as_the_subject(before: str, subject: str, after: str) -> None:
    for prompt in (f"{before} {{}} {after}", f"{before} {subject} {after}"):
        found = edit(subject=subject, prompt=prompt)
        assert found.text[slice(*found.span)] == subject


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_either_makes_an_edit_that_holds_together_or_is_refused(s: str, p: str, t: str) -> None:
    try:
        made = Edit(subject=s, prompt=p, target=t)
    except ValidationError:
        return
    assert all(x.strip() for x in (made.subject, made.target, made.text))
    assert made.text[slice(*made.span)] == made.subject


def test_surrounding_space_is_no_part_of_subject_target_or_prompt_end() -> None:
    loose = edit(subject=" France ", prompt="The capital of France is  ", target=" Rome\n")
    assert (loose.subject, loose.prompt, loose.target) == ("France", "The capital of France is", "Rome")


@pytest.mark.parametrize("field", ["subject", "prompt", "target", "previous", "reason", "source"])
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("a\x00b", "NUL"),
        ("a\ud800b", "surrogate"),
        ("x" * (MAX_CHARS + 1), f"{MAX_CHARS:,}"),
    ],
)
def test_a_bad_text_is_refused_by_the_name_of_its_field(field: str, value: str, complaint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        edit(**{field: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (field,)
    assert complaint in error["msg"]


@pytest.mark.parametrize(
    "fields",
    [
        {"paraphrases": ("",)},
        {"neighbours": ({"prompt": "\x00"},)},
        {"neighbours": ({"prompt": "The capital of Spain is", "answer": " "},)},
        {"portability": ({"prompt": "x", "answer": ""},)},
        {"portability": ({"prompt": "x"},)},
    ],
)
def test_probes_are_validated_like_the_rest(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        edit(**fields)


def test_a_prompt_without_the_subject_is_refused_with_both_named() -> None:
    with pytest.raises(
        ValidationError, match=r"'The capital of Spain is' does not contain the subject 'France'"
    ):
        edit(prompt="The capital of Spain is")


def test_two_placeholders_are_refused() -> None:
    with pytest.raises(ValidationError, match="more than one"):
        edit(prompt="{} and {} is")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        edit(colour="red")


def test_an_edit_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        edit().target = "Berlin"  # type: ignore[misc]


def test_an_edit_survives_json() -> None:
    rich = edit(
        previous="Paris",
        paraphrases=("France's capital is",),
        neighbours=(Neighbour(prompt="The capital of Spain is", answer=None),),
        portability=(Probe(prompt="The mayor of France's capital is", answer="Roberto"),),
        reason="a test 😀",
        source="nowhere",
    )
    assert Edit.model_validate_json(rich.model_dump_json()) == rich


@pytest.mark.parametrize("text", ["What is it?", "何ですか？", "ما هي؟", "Really? "])
def test_a_question_is_known_by_its_mark(text: str) -> None:
    assert is_question(text)


@pytest.mark.parametrize("text", ["The capital is", "Is it? No."])
def test_a_statement_is_no_question(text: str) -> None:
    assert not is_question(text)
