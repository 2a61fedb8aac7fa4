"""What a module reads at the later tokens of texts."""

from __future__ import annotations

import torch

from editors.closed_form.keys import read_keys
from editors.closed_form.later_inputs import LaterInputs, _extensions, read_later_inputs
from tests.families import make


def test_inputs_from_a_token_on_are_those_of_the_rows_that_end_there() -> None:
    lm = make("gemma3")
    module = lm.module(lm.mlp_out(2))
    rows = [tuple(lm.encode(lm.prompt(text))[0]) for text in ("The capital of Peru is Lima", "It is a")]
    for row, later in zip(rows, read_later_inputs(lm, module, [(row, 1) for row in rows]), strict=True):
        alone = read_keys(lm, [2], [row[: i + 1] for i in range(1, len(row))])[2]
        assert later.shape == alone.shape
        torch.testing.assert_close(later, alone, rtol=1e-4, atol=1e-5)


def test_rows_that_begin_alike_have_the_inputs_that_each_has_alone() -> None:
    lm = make("llama")
    texts = (
        "The capital city of the country of Peru is",
        "The capital city of the country of Peru is Lima",
        "It is",
        "The capital city of the country of Chile is Santiago",
    )
    rows = [(tuple(lm.encode(lm.prompt(text))[0]), 2) for text in texts]
    assert _extensions([ids for ids, _ in rows])[0] == 1, "the first is read with the second"
    rows += [(ids, len(ids) - 1) for ids, _ in rows]
    for (ids, first), later in zip(rows, read_later_inputs(lm, lm.module(lm.mlp_out(2)), rows), strict=True):
        alone = read_keys(lm, [2], [ids[: i + 1] for i in range(first, len(ids))])[2]
        torch.testing.assert_close(later, alone, rtol=1e-4, atol=1e-5)


def test_inputs_at_the_end_of_some_beginnings_can_be_left_out() -> None:
    inputs = LaterInputs([((5, 6, 7), 1), ((5, 8), 1)], [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])])
    assert inputs.without([(5, 6), (9,)]).flatten().tolist() == [2.0, 3.0]
