"""RETS: what is moved, what is held, and that a fact is written without the subject's other facts."""

from __future__ import annotations

import json

import pytest
import torch

from editors import METHODS
from editors.closed_form import relation_texts as texts_of
from editors.closed_form.keys import _extensions, read_keys, read_later_keys
from editors.closed_form.material_rows import NOTHING
from editors.closed_form.relation_texts import others_of, relation_texts, with_others
from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.kinds import WORDS
from editors.forms.material import material_for
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.patch import WeightPatch
from tests.editors.conftest import StatisticsOf
from tests.families import make

EDIT = Edit(subject="Peru", prompt="The capital of {} is", target="Quito")


def test_the_change_acts_where_the_target_begins_and_is_held_off_elsewhere(
    statistics_of: StatisticsOf,
) -> None:
    lm = make("llama")
    method = METHODS["rets"]
    params = method.params(layer=1, forms=False, max_steps=2, slack=0.01)
    patch = method.compute(lm, [EDIT], params, EditContext(statistics_of(lm)))
    assert isinstance(patch, WeightPatch)
    delta = patch.deltas[lm.mlp_out(1)]
    assert isinstance(delta, LowRank)
    (texts,) = relation_texts(lm, [EDIT], [with_others(EDIT, NOTHING)], params.contexts)
    moved = read_later_keys(lm, 1, [(ids, len(ids) - 1) for ids in texts.moved])
    held = read_later_keys(lm, 1, [(text.ids, text.first) for text in texts.held])
    shares = [(torch.cat(keys) @ delta.right[0]).abs() for keys in (moved, held)]
    assert shares[0].min() > 0.4
    assert shares[1].mean() < shares[0].mean() / 3


def test_keys_from_a_token_on_are_those_of_the_rows_that_end_there() -> None:
    lm = make("gemma3")
    rows = [tuple(lm.encode(lm.prompt(text))[0]) for text in ("The capital of Peru is Lima", "It is a")]
    for row, later in zip(rows, read_later_keys(lm, 2, [(row, 1) for row in rows]), strict=True):
        alone = read_keys(lm, [2], [row[: i + 1] for i in range(1, len(row))])[2]
        assert later.shape == alone.shape
        torch.testing.assert_close(later, alone, rtol=1e-4, atol=1e-5)


def test_rows_that_begin_alike_have_the_keys_that_each_has_alone() -> None:
    lm = make("llama")
    texts = (
        "The capital city of the country of Peru is",
        "The capital city of the country of Peru is Lima",
        "It is",
    )
    texts += ("The capital city of the country of Chile is Santiago",)
    rows = [(tuple(lm.encode(lm.prompt(text))[0]), 2) for text in texts]
    assert _extensions([ids for ids, _ in rows])[0] == 1, "the first is read with the second"
    rows += [(ids, len(ids) - 1) for ids, _ in rows]
    for (ids, first), later in zip(rows, read_later_keys(lm, 2, rows), strict=True):
        alone = read_keys(lm, [2], [ids[: i + 1] for i in range(first, len(ids))])[2]
        torch.testing.assert_close(later, alone, rtol=1e-4, atol=1e-5)


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


def test_without_forms_the_other_subjects_are_counted_as_trained_on_too(
    statistics_of: StatisticsOf,
) -> None:
    lm, method = make("llama"), METHODS["rets"]
    params = method.params(layer=1, forms=False, max_steps=1)
    patch = method.compute(lm, [EDIT], params, EditContext(statistics_of(lm)))
    trained = method.trained_prompts(patch, [EDIT], params)
    held = {hold.prompt for hold in with_others(EDIT, NOTHING).held}
    assert len(held) >= 4
    assert held <= trained


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
