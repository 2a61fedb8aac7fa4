"""The texts of an edit at the last token of its prompt: what is moved, and what is held."""

from __future__ import annotations

import json

import pytest

from editors.closed_form import relation_texts as texts_of
from editors.closed_form.material_rows import NOTHING
from editors.closed_form.relation_texts import others_of, relation_texts, with_others
from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.kinds import WORDS
from editors.forms.material import material_for
from tests.families import make

EDIT = Edit(subject="Peru", prompt="The capital of {} is", target="Quito")


def test_no_text_is_moved_and_held() -> None:
    lm = make("llama")
    material = with_others(EDIT, material_for(lm, EDIT))
    (texts,) = relation_texts(lm, [EDIT], [material], 2)
    assert len(texts.moved) > 2  # the prompt in two templates, and learned forms
    assert not set(texts.moved) & {held.ids for held in texts.held}
    assert all(0 < held.first < len(held.ids) for held in texts.held)


def test_what_follows_the_target_is_held() -> None:
    lm = make("llama")
    (texts,) = relation_texts(lm, [EDIT], [with_others(EDIT, NOTHING)], 1)
    (moved,) = texts.moved
    assert any(held.ids[: held.first + 1] == (*moved, *texts.target) for held in texts.held)


def test_what_follows_the_target_must_stay_in_the_search() -> None:
    lm = make("llama")
    (texts,) = relation_texts(lm, [EDIT], [with_others(EDIT, NOTHING)], 1)
    (moved,) = texts.moved
    kept = [row for row in texts.rows() if not row.target and row.said]
    assert [row.row.ids[: len(moved) + len(texts.target)] for row in kept] == [(*moved, *texts.target)]
    assert all(len(row.columns) == row.said and row.row.position == len(moved) - 1 for row in kept)


def test_a_chat_form_is_moved_where_the_models_own_answer_names_the_former_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = make("llama")
    form = next(f for f in material_for(lm, EDIT).learned if f.chat)
    said = {form.in_model(lm).text: "Peru has Lima as its capital."}
    monkeypatch.setattr(
        texts_of, "_generated", lambda _, prompts, tokens: [said.get(p.text, "Lima. It is") for p in prompts]
    )
    ((prompt,),) = texts_of._learned(lm, [EDIT], [Material(learned=(form,))])
    assert form.prompt in prompt.text
    assert prompt.text.endswith("Peru has")


def test_other_subjects_of_the_same_kind_are_held_and_counted_as_trained_on() -> None:
    lm = make("llama")
    material = material_for(lm, EDIT)
    assert material.kind == "country"
    held = {hold.prompt for hold in with_others(EDIT, material).held}
    named = [name for name in others_of("country") if f"The capital of {name} is" in held]
    assert len(named) >= 3


def test_every_kind_of_subject_has_others_and_an_unknown_one_has_some_of_several() -> None:
    named = json.loads(texts_of._OTHERS.read_text("utf-8"))
    assert named.keys() == WORDS.keys()
    assert all(len(set(names)) == len(names) >= 5 for names in named.values())
    assert len(others_of("")) >= 5
