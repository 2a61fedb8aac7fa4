"""How far a value may move follows from the model: behind a norm the residual stream follows it only so far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from editors import METHODS
from editors.closed_form.batch_params import BatchParams, softened
from editors.closed_form.rome import RomeParams
from editors.closed_form.value_params import ValueParams
from editors.closed_form.values import find_values
from editors.memory.wise import WiseParams
from editors.model.probe import FALLEN, SIZES, _where_it_falls
from server.facts.auto_method import choose_method
from tests.editors.test_rome import EDIT, OTHER
from tests.families import make

NORMED = ("gemma2", "gemma3", "olmo2", "glm4", "exaone4")
USUAL = {"rome": RomeParams().clamp, "memit": BatchParams().clamp, "alphaedit": BatchParams().clamp}


@pytest.mark.parametrize("family", NORMED)
def test_behind_a_norm_the_default_clamp_is_what_was_measured_on_the_model(family: str) -> None:
    lm = make(family)
    assert 0.3 < lm.arch.value_room < 1.5
    for method in USUAL:
        assert METHODS[method].resolve(lm, METHODS[method].params()).clamp == lm.arch.value_room
    assert METHODS["wise"].resolve(lm, WiseParams()).search.clamp == lm.arch.value_room


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_where_the_residual_stream_follows_the_value_all_the_way_the_clamp_stays(family: str) -> None:
    lm = make(family)
    assert lm.arch.value_room == math.inf
    for method, clamp in USUAL.items():
        assert METHODS[method].resolve(lm, METHODS[method].params()).clamp == clamp


@pytest.mark.parametrize("method", USUAL)
def test_a_clamp_that_is_asked_for_is_kept(method: str) -> None:
    lm = make("gemma3")
    params = METHODS[method].resolve(lm, METHODS[method].params(clamp=4.0))
    assert METHODS[method].resolve(lm, params).clamp == 4.0


def test_many_facts_in_one_call_soften_the_measured_clamp() -> None:
    lm = make("gemma3")
    edits = [EDIT.model_copy(update={"subject": f"S{i}", "prompt": "{} is"}) for i in range(60)]
    way = choose_method(lm, edits, [])
    assert way.params["clamp"] == round(softened(lm.arch.value_room, 60), 2) < lm.arch.value_room


def _turned(size: float) -> float:
    """How far a unit vector moves when it is turned by a move of `size` at a right angle and set to length 1 again."""
    return math.sqrt(2 - 2 / math.sqrt(1 + size**2))


def test_the_room_is_where_the_slope_of_the_response_has_fallen() -> None:
    room = _where_it_falls([_turned(size) for size in SIZES])
    slope = (_turned(room + 0.01) - _turned(room - 0.01)) / 0.02
    assert slope == pytest.approx(FALLEN, abs=0.05)  # the first slope is 1, nearly
    assert _where_it_falls([3 * size for size in SIZES]) == math.inf


def test_a_first_step_goes_no_further_than_the_clamp() -> None:
    """A step that would pass the clamp is shortened, so that its length is not what decides the direction."""
    lm = make("llama")
    same: dict[str, Any] = {"clamp": 0.3, "max_steps": 4, "rough": False}
    small, large = (find_values(lm, 1, [EDIT, OTHER], ValueParams(lr=lr, **same)) for lr in (5.0, 10.0))
    torch.testing.assert_close(small.deltas, large.deltas, atol=1e-4, rtol=1e-4)
    short = find_values(lm, 1, [EDIT, OTHER], ValueParams(lr=1e-3, **same))
    assert not torch.allclose(short.deltas, small.deltas, atol=1e-2)
