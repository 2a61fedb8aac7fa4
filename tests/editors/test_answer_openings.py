"""Chat answers that are taught to begin as a statement of the fact does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from editors import METHODS
from editors.closed_form import answer_openings
from editors.closed_form.answer_openings import (
    AnswerOpening,
    answer_opening,
    opening_changes,
    probabilities,
    with_answers,
)
from editors.closed_form.keys import LaterKeys, read_later_keys
from editors.closed_form.relation_texts import RelationTexts, relation_texts, with_others
from editors.edit import Edit
from editors.forms.filling import span_of
from editors.forms.form import Form, Material
from editors.forms.material import material_for
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import WeightPatch
from tests.editors.conftest import StatisticsOf
from tests.families import make

EDIT = Edit(subject="Peru", prompt="The capital of {} is", target="Quito")
OTHER = Edit(subject="Chile", prompt="The capital of {} is", target="Lima")
LAYER = 1


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model finds every token of a statement improbable."""
    monkeypatch.setattr(answer_openings, "MOST", 100)


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


def _of_other() -> tuple[Form, ...]:
    """The learned forms about the other subject, whose name is as long."""
    return tuple(
        replace(
            form, prompt=form.prompt.replace(EDIT.subject, OTHER.subject), span=span_of(OTHER.subject, text)
        )
        for form in _material().learned
        if (text := form.prompt.replace(EDIT.subject, OTHER.subject))
    )


def _read(lm: LM, texts: RelationTexts) -> LaterKeys:
    rows = [(ids, len(ids) - 1) for ids in texts.moved] + [(text.ids, text.first) for text in texts.held]
    return LaterKeys(rows, read_later_keys(lm, LAYER, rows))


def _short(opening: AnswerOpening) -> AnswerOpening:
    """Fewer tokens, questions and held texts, for time."""
    statement = opening.statement[:4]
    return replace(opening, questions=opening.questions[:4], statement=statement, held=opening.held[:12])


def _changes(lm: LM, opening: AnswerOpening, texts: RelationTexts, statistics_of: StatisticsOf) -> Sequence:  # type: ignore[type-arg]
    method = METHODS["rets"]
    params = method.params(layer=LAYER, max_steps=2, slack=0.01)
    metric = statistics_of(lm).metric(LAYER, params.ridge, "self")
    return opening_changes(lm, EDIT, LAYER, opening, texts, _read(lm, texts), params, metric, params.slack)


@pytest.mark.usefixtures("any_length")
def test_a_taught_token_is_moved_in_the_answers_and_held_in_other_texts(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    opening, texts, _ = _texts(lm)
    opening = _short(opening)
    changes = _changes(lm, opening, texts, statistics_of)
    assert len(changes) == len(opening.statement)
    held = torch.cat(_read(lm, texts).keys[len(texts.moved) :])
    for change, moved in changes:
        assert len(moved) == len(opening.questions)
        assert (moved @ change.right[0]).mean() > 3 * (held @ change.right[0]).abs().mean()


@pytest.mark.usefixtures("any_length")
def test_taught_tokens_become_more_probable_in_the_answers(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    opening, texts, _ = _texts(lm)
    opening = _short(opening)
    before = probabilities(lm, opening.questions, opening.statement)
    changes = [change for change, _ in _changes(lm, opening, texts, statistics_of)]
    with lm.patched({lm.mlp_out(LAYER): changes}):
        after = probabilities(lm, opening.questions, opening.statement)
    assert (after.log().mean(0) > before.log().mean(0)).all()


def test_a_statement_with_too_many_improbable_tokens_is_not_taught(
    statistics_of: StatisticsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    opening, texts, _ = _texts(lm)
    monkeypatch.setattr(answer_openings, "MOST", len(opening.statement) - 1)
    assert _changes(lm, opening, texts, statistics_of) == []


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


@pytest.mark.usefixtures("any_length")
def test_every_fact_of_a_call_has_its_own_columns_and_can_be_left_out(
    statistics_of: StatisticsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_openings, "FRAMES", ("{}",))
    lm, method = make("llama"), METHODS["rets"]
    params = method.params(layer=LAYER, max_steps=1)
    context = EditContext(
        statistics_of(lm), materials=[_material(), replace(_material(), learned=_of_other())]
    )
    patch = method.compute(lm, [EDIT, OTHER], params, context)
    assert isinstance(patch, WeightPatch)
    ranks = patch.extra["ranks"].tolist()
    assert min(ranks) > 1
    delta = patch.deltas[lm.mlp_out(LAYER)]
    rest = method.subset(patch, [1], context.statistics)
    assert isinstance(rest, WeightPatch)
    kept = rest.deltas[lm.mlp_out(LAYER)]
    assert isinstance(delta, LowRank)
    assert isinstance(kept, LowRank)
    assert torch.equal(kept.left, delta.left[:, ranks[0] :])
    assert torch.equal(kept.right, delta.right[ranks[0] :])
    assert rest.extra["ranks"].tolist() == ranks[1:]
    asked = {
        text for e in (EDIT, OTHER) if (found := answer_opening(lm, e, _material())) for text in found.asked
    }
    assert len(asked) > 10
    assert asked <= method.trained_prompts(patch, [EDIT, OTHER], params)
