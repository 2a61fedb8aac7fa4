"""The table of steering methods, and steering as a library without a server."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import pytest
import torch

from editors.errors import InvalidEdit
from editors.steering.choices import Method
from editors.steering.method import VectorInput
from editors.steering.methods import STEERING_METHODS, compute_vector
from editors.steering.pairs import Pair
from tests.families import FAMILIES, make
from tools import steer

PAIRS = [
    Pair(prompt="The film was", positive=f"a joy in {place}", negative=f"a bore in {place}")
    for place in ("Paris", "London", "Rome", "Berlin")
]


def test_the_tool_accepts_and_describes_the_methods_of_the_table() -> None:
    assert get_args(Method) == tuple(STEERING_METHODS)
    spec = next(s for s in steer.toolset.specs if s.function.__name__ == "create_steering_vector")
    (field,) = get_type_hints(spec.function, include_extras=True)["method"].__metadata__
    assert re.findall(r"(?:^|; )(\w+): \w", field.description) == list(STEERING_METHODS)
    assert all(m.when and m.source for m in STEERING_METHODS.values())


@pytest.mark.parametrize("method", [m.name for m in STEERING_METHODS.values() if m.takes == "pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_steers_inside_the_block_and_leaves_nothing_behind(family: str, method: str) -> None:
    lm = make(family)
    question = (lm.prompt("The film was", chat=False), "a joy")
    before = lm.score([question])[0].logprob
    vector = compute_vector(lm, PAIRS, method)
    with vector.apply(lm, multiplier=1.0):
        assert lm.score([question])[0].logprob != before
    with vector.apply(lm, multiplier=0):
        assert lm.score([question])[0].logprob == before
    assert lm.score([question])[0].logprob == before


@pytest.mark.parametrize("method", STEERING_METHODS.values(), ids=lambda m: m.name)
def test_input_that_a_method_does_not_take_is_refused(method: object) -> None:
    lm = make("gpt2")
    both = VectorInput(pairs=PAIRS, positive_prompt="Be cheerful.")
    with pytest.raises(InvalidEdit, match="leave"):
        method.compute(lm, both, lambda fraction, message: None)  # type: ignore[attr-defined]


def test_an_unknown_method_and_a_layer_that_is_not_there_are_refused() -> None:
    lm = make("gpt2")
    with pytest.raises(InvalidEdit, match="the methods are caa, pca, lm_steer, prompt"):
        compute_vector(lm, PAIRS, "ica")
    with pytest.raises(InvalidEdit, match="layer 99 does not exist"):
        compute_vector(lm, PAIRS, layers=[99])
    assert torch.is_tensor(compute_vector(lm, PAIRS, layers=[1]).directions)
