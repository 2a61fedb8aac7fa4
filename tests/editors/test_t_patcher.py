"""Transformer-Patcher: a fact in neurons of its own, active where it is asked, and taught answers in chat."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from editors import METHODS
from editors.closed_form import answer_openings, neurons, t_patcher
from editors.closed_form.answer_openings import answer_opening, probabilities
from editors.closed_form.later_inputs import read_later_inputs
from editors.closed_form.material_rows import NOTHING
from editors.closed_form.neurons import MLPNeurons, taken_by
from editors.closed_form.relation_texts import relation_texts, with_others
from editors.edit import Edit
from editors.errors import EditError
from editors.forms.filling import span_of
from editors.forms.form import Form, Material
from editors.forms.material import material_for
from editors.method import EditContext, Prior
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch
from tests.editors.conftest import StatisticsOf
from tests.families import make

EDIT = Edit(subject="Peru", prompt="The capital of {} is", target="Quito")
OTHER = Edit(subject="Chile", prompt="The capital of {} is", target="Lima")
LAYER = 1
METHOD = METHODS["t_patcher"]


@pytest.fixture(autouse=True)
def room_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has few neurons, and finds every token of a statement improbable."""
    monkeypatch.setattr(neurons, "MOST_TAKEN", 1.0)
    monkeypatch.setattr(t_patcher, "MOST", 100)
    monkeypatch.setattr(answer_openings, "FRAMES", ("{}",))


@cache
def _material() -> Material:
    material = material_for(make("llama"), EDIT)
    some = {form.kind: form for form in reversed(material.learned) if form.span and form.language == "en"}
    return replace(material, learned=tuple(some.values()))


def _of_other() -> tuple[Form, ...]:
    """The learned forms about the other subject, whose name is as long."""
    return tuple(
        replace(form, prompt=text, span=span_of(OTHER.subject, text))
        for form in _material().learned
        if (text := form.prompt.replace(EDIT.subject, OTHER.subject))
    )


def _computed(lm: LM, context: EditContext, *edits: Edit, **params: object) -> WeightPatch:
    METHOD_PARAMS = {"layer": LAYER, "max_steps": 2, **params}
    patch = METHOD.compute(lm, edits or [EDIT], METHOD.params(**METHOD_PARAMS), context)
    assert isinstance(patch, WeightPatch)
    return patch


def _context(lm: LM, statistics_of: StatisticsOf, **more: object) -> EditContext:
    return EditContext(statistics_of(lm), **more)  # type: ignore[arg-type]


def _added(lm: LM, patch: Patch, rows: list[tuple[tuple[int, ...], int]]) -> torch.Tensor:
    """How far the MLP's output moves at each token of some rows, but for what its neurons wrote before."""
    assert isinstance(patch, WeightPatch)
    down = patch.deltas[lm.mlp_out(LAYER)]
    assert isinstance(down, LowRank)
    at = down.right.argmax(1)
    with lm.patched({name: [delta] for name, delta in patch.deltas.items()}):
        hidden = torch.cat(read_later_inputs(lm, lm.module(lm.mlp_out(LAYER)), rows))[:, at]
        written = lm.weight(lm.mlp_out(LAYER))[:, at]
    return (hidden @ written.t()).norm(dim=1)


def test_the_neurons_write_where_the_target_begins_and_not_where_texts_are_held(
    statistics_of: StatisticsOf,
) -> None:
    lm = make("llama")
    patch = _computed(lm, _context(lm, statistics_of), forms=False)
    (texts,) = relation_texts(lm, [EDIT], [with_others(EDIT, NOTHING)], 2)
    moved = _added(lm, patch, [(ids, len(ids) - 1) for ids in texts.moved])
    held = _added(lm, patch, [(text.ids, text.first) for text in texts.held])
    assert moved.mean() > 10 * held.mean()
    assert (held > moved.mean() / 3).float().mean() < 0.1


def test_taught_tokens_become_more_probable_in_the_answers(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    opening = answer_opening(lm, EDIT, _material())
    assert opening is not None
    before = probabilities(lm, opening.questions, opening.statement)
    patch = _computed(lm, _context(lm, statistics_of, materials=[_material()]), max_steps=6)
    assert patch.extra["ranks"].tolist() == [2 + 2 * len(opening.statement)]
    with lm.patched({name: [delta] for name, delta in patch.deltas.items()}):
        after = probabilities(lm, opening.questions, opening.statement)
    assert (after.log().mean(0) > before.log().mean(0)).all()


def test_a_statement_with_too_many_improbable_tokens_is_not_taught(
    statistics_of: StatisticsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t_patcher, "MOST", 1)
    lm = make("llama")
    patch = _computed(lm, _context(lm, statistics_of, materials=[_material()]))
    assert patch.extra["ranks"].tolist() == [2]


def test_where_too_few_neurons_are_left_the_fact_alone_is_written(
    statistics_of: StatisticsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "MOST_TAKEN", 6 / 64)
    lm = make("llama")
    patch = _computed(lm, _context(lm, statistics_of, materials=[_material()]))
    assert patch.extra["ranks"].tolist() == [2]
    context = _context(lm, statistics_of, materials=[_material(), Material()])
    assert _computed(lm, context, EDIT, OTHER).extra["ranks"].tolist() == [2, 2]


def test_every_fact_of_a_call_has_its_own_neurons_and_can_be_left_out(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    materials = [_material(), replace(_material(), learned=_of_other())]
    context = _context(lm, statistics_of, materials=materials)
    patch = _computed(lm, context, EDIT, OTHER, max_steps=1)
    ranks = patch.extra["ranks"].tolist()
    assert min(ranks) > 2
    assert sum(ranks) == len(taken_by([patch], _gate(lm)))
    rest = METHOD.subset(patch, [1], context.statistics)
    assert isinstance(rest, WeightPatch)
    for name, delta in patch.deltas.items():
        kept = rest.deltas[name]
        assert isinstance(delta, LowRank)
        assert isinstance(kept, LowRank)
        assert torch.equal(kept.left, delta.left[:, ranks[0] :])
        assert torch.equal(kept.right, delta.right[ranks[0] :])
    asked = {t for e in (EDIT, OTHER) if (o := answer_opening(lm, e, _material())) for t in o.asked}
    assert asked <= METHOD.trained_prompts(patch, [EDIT, OTHER], METHOD.params())


def _gate(lm: LM) -> str:
    return MLPNeurons(lm, LAYER).gate


def test_an_edit_takes_no_neuron_that_an_active_one_has_taken(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    first = _computed(lm, _context(lm, statistics_of), forms=False)
    prior = Prior(METHOD.name, first, (0,))
    with lm.patched({name: [delta] for name, delta in first.deltas.items()}):
        second = _computed(lm, _context(lm, statistics_of, prior=[prior]), OTHER, forms=False)
    both = [taken_by([patch], _gate(lm)) for patch in (first, second)]
    assert len(both[0]) == len(both[1]) == 2
    assert not both[0] & both[1]


def test_where_no_neuron_is_left_the_error_says_what_to_do_and_that_helps(
    statistics_of: StatisticsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "MOST_TAKEN", 2 / 64)
    lm = make("llama")
    first = _computed(lm, _context(lm, statistics_of), forms=False)
    context = _context(lm, statistics_of, prior=[Prior(METHOD.name, first, (0,))])
    with pytest.raises(EditError, match=r"3% of the neurons of layer 1; name another params\.layer, revert"):
        _computed(lm, context, OTHER, forms=False)
    assert _computed(lm, context, OTHER, forms=False, layer=2).deltas


def test_facts_of_one_subject_in_a_call_are_told_apart() -> None:
    more = Edit(subject="Peru", prompt="The currency of {} is the", target="euro")
    held = t_patcher.prepared([EDIT, more], (), later=True)
    assert [[hold.prompt for hold in each.held] for each in held] == [[more.text], [EDIT.text]]
    assert [len(each.held) for each in t_patcher.prepared([EDIT, more], ())] == [0, 1]


def test_without_forms_the_other_subjects_are_counted_as_trained_on_too(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    patch = _computed(lm, _context(lm, statistics_of), forms=False, max_steps=1)
    held = {hold.prompt for hold in with_others(EDIT, NOTHING).held}
    assert len(held) >= 4
    assert held <= METHOD.trained_prompts(patch, [EDIT], METHOD.params())


@pytest.mark.parametrize(
    ("family", "reason"), [("mixtral", "experts"), ("nemotron", "relu2"), ("t5", "encoder")]
)
def test_models_whose_mlps_have_no_neurons_to_take_over_are_refused_with_a_way_out(
    family: str, reason: str
) -> None:
    refused = METHOD.supports(make(family))
    assert refused is not None
    assert reason in refused
    ways = [name for name in ("memit", "constrained", "ft", "lora") if name in refused]
    assert any(METHODS[name].supports(make(family)) is None for name in ways)
