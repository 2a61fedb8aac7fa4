"""Detectors, and neurons that are taken over: a ramp of what a detector says, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editors.closed_form.detectors import MARGIN, OrdinarySpace
from editors.closed_form.neurons import NEURONS, MLPNeurons, joined_deltas, taken_by, why_no_ramp, writing
from editors.model.activations import record
from editors.model.lm import LM
from editors.patch import WeightPatch
from tests.families import make

LAYER, LOW = 1, -0.5
TEXT = "The capital of Peru is a city that lies near the sea, and the people of the country speak"


def _ids(lm: LM) -> Tensor:
    return torch.tensor([lm.encode(lm.prompt(TEXT))[0][:20]])  # fewer tokens than inputs


@torch.no_grad()
def _seen(lm: LM, parameter: str, *, inputs: bool = True) -> Tensor:
    with record({0: lm.module(parameter)}, inputs=inputs) as seen:
        lm.base_model(input_ids=_ids(lm), use_cache=False)
    return seen[0].reshape(-1, seen[0].shape[-1]).float()


def _ordinary(size: int = 24, tokens: int = 400) -> Tensor:
    states = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1))
    states[:, 0] = 5.0  # every input has a common part, as after a norm
    return states


def test_a_detector_tells_moved_inputs_from_held_and_ordinary_ones() -> None:
    ordinary = _ordinary()
    space = OrdinarySpace.of(ordinary)
    moved, held = ordinary[:6] * 0.1, ordinary[:6] * 0.1
    for each in (moved, held):
        each[:, 0] = 5.0
    moved[:, 3], held[:, 3] = 9.0, -9.0
    detector = space.detector(moved, held)
    assert (moved @ detector).min() > 0.8 * MARGIN
    assert (held @ detector).max() < -0.8 * MARGIN
    assert ((ordinary @ detector) > 0).float().mean() < 0.02


def test_one_direction_takes_the_place_of_a_bias() -> None:
    ordinary = _ordinary()
    ones = ordinary @ OrdinarySpace.of(ordinary).one
    assert abs(float(ones.mean()) - 1) < 1e-3
    assert ones.std() < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3", "opt"])
def test_the_ramp_is_nothing_below_the_threshold_and_one_above_the_margin(family: str) -> None:
    lm = make(family)
    mlp = MLPNeurons(lm, LAYER)
    states = _seen(lm, mlp.gate)
    space = OrdinarySpace.of(torch.cat([states, states + 1e-2 * torch.randn_like(states)]))
    # a direction that scores the tokens -2, 0.2 and 3 in turn
    wanted = torch.tensor([-2.0, 0.2, 3.0]).repeat(len(states))[: len(states)]
    detector = torch.linalg.lstsq(states, wanted).solution
    assert torch.allclose(states @ detector, wanted, atol=0.05)
    neurons, x = mlp.ramp((3, 5), detector, space.one, LOW)
    with lm.patched({name: [delta] for name, delta in mlp.deltas(neurons).items()}):
        ramp = _seen(lm, mlp.down) @ x
    assert ramp[wanted == -2.0].abs().max() < 0.1
    assert (ramp[wanted == 3.0] - 1).abs().max() < 0.15
    assert ((ramp[wanted == 0.2] > 0.2) & (ramp[wanted == 0.2] < 0.8)).all()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_ramp_adds_its_value_and_what_its_neurons_wrote_before_is_gone(family: str) -> None:
    lm = make(family)
    mlp = MLPNeurons(lm, LAYER)
    one = OrdinarySpace.of(_seen(lm, mlp.gate)).one
    before, hidden, weight = _seen(lm, mlp.down, inputs=False), _seen(lm, mlp.down), lm.weight(mlp.down)
    value = torch.linspace(-1, 1, lm.d_model)
    neurons, x = mlp.ramp((3, 5), 5 * one, one, LOW)  # fires everywhere
    with lm.patched({name: [d] for name, d in mlp.deltas(writing(neurons, x, value)).items()}):
        after, share = _seen(lm, mlp.down, inputs=False), _seen(lm, mlp.down) @ x
    wanted = before - hidden[:, [3, 5]] @ weight[:, [3, 5]].t() + share[:, None] * value
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


def test_the_least_used_neurons_are_taken_first_and_none_twice() -> None:
    lm = make("llama")
    mlp = MLPNeurons(lm, LAYER)
    activity = torch.ones(mlp.size)
    activity[[7, 4]] = torch.tensor([1e-3, 1e-6])
    assert mlp.least_used(activity, ())[:2] == [4, 7]
    assert 4 not in mlp.least_used(activity, {4})
    neurons, _ = mlp.ramp((4, 7), torch.ones(lm.d_model), torch.ones(lm.d_model), LOW)
    patch = WeightPatch(mlp.deltas(neurons), info={NEURONS: {mlp.gate: mlp.size}})
    assert taken_by([patch], mlp.gate) == {4, 7}
    assert taken_by([WeightPatch(mlp.deltas(neurons))], mlp.gate) == set(), (
        "another method's change of this weight"
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_weight_has_as_many_columns_for_a_neuron(family: str) -> None:
    lm = make(family)
    mlp = MLPNeurons(lm, LAYER)
    pair, _ = mlp.ramp((4, 7), torch.ones(lm.d_model), torch.ones(lm.d_model), LOW)
    parts = [mlp.deltas(pair), mlp.deltas(pair[:1])]
    joined = joined_deltas(parts)
    ranks = {delta.right.shape[0] for delta in joined.values()}
    assert len(ranks) == 1
    for name, delta in joined.items():
        first = delta.select([0], [part[name].right.shape[0] for part in parts])
        assert torch.equal(first.dense(), parts[0][name].dense())


def test_experts_and_other_activations_have_no_ramp() -> None:
    assert "experts" in (why_no_ramp(make("mixtral"), LAYER) or "")
    assert "relu2" in (why_no_ramp(make("nemotron"), LAYER) or "")
    assert why_no_ramp(make("llama"), LAYER) is None
