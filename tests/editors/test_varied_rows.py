"""The part of the model above an edited MLP gives what the whole model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from editors.closed_form.varied_rows import VariedRow, VariedRows
from editors.errors import Unsupported
from editors.model.lm import LM
from tests.families import DECODERS, HIDDEN, LAYERS, make

TEXTS = (
    ("The capital of France is Paris", 3),
    ("Danielle Darrieux is a native speaker of", 4),
    ("In Stockholm, most children learn Swedish at school.", 1),
    ("Big Ben", 1),
)


def rows_of(lm: LM, first: bool = False) -> list[VariedRow]:
    found = []
    for text, position in TEXTS:
        ids = lm.encode(lm.prompt(text))[0]
        found.append(VariedRow(tuple(ids), 0 if first else min(position, len(ids) - 1)))
    return found


def full(lm: LM, layer: int, row: VariedRow, delta: Tensor) -> Tensor:
    """Logits of a whole forward pass of one row with `delta` added: (length, vocabulary)."""

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        shaped = output.clone().view(1, len(row.ids), HIDDEN)
        shaped[0, row.position] += delta.to(output.dtype)
        return shaped.view_as(output)

    with lm.module(lm.mlp_out(layer)).register_forward_hook(add):
        logits: Tensor = lm.model(input_ids=torch.tensor([row.ids], device=lm.device)).logits[0]
    return logits


def check(
    lm: LM, layer: int, rows: Sequence[VariedRow], above: VariedRows, delta: Tensor, tolerance: float
) -> None:
    logits = lm.head(above(delta))
    for i, row in enumerate(rows):
        expected = full(lm, layer, row, delta[i])[row.position :]
        torch.testing.assert_close(logits[i, : len(expected)], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", DECODERS)
def test_it_gives_the_logits_of_a_full_forward(family: str, layer: int) -> None:
    lm = make(family)
    rows = rows_of(lm)
    generator = torch.Generator().manual_seed(layer)
    delta = torch.randn(len(rows), HIDDEN, generator=generator).to(lm.device)
    above = VariedRows(lm, layer, rows)
    with torch.no_grad():
        check(lm, layer, rows, above, torch.zeros_like(delta), 2e-4)
        check(lm, layer, rows, above, delta, 2e-4)
        check(lm, layer, rows, above, 2 * delta, 2e-4)  # the constant part was not spoiled by the first run


@pytest.mark.parametrize("family", DECODERS)
def test_the_varied_token_may_be_the_very_first(family: str) -> None:
    lm = make(family)
    rows = rows_of(lm, first=True)
    with torch.no_grad():
        check(lm, 1, rows, VariedRows(lm, 1, rows), torch.randn(len(rows), HIDDEN, device=lm.device), 2e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_going_on_with_some_rows_changes_nothing_for_them(family: str) -> None:
    lm = make(family)
    rows = rows_of(lm)
    above = VariedRows(lm, 1, rows)
    above.select([3, 1])
    with torch.no_grad():
        check(lm, 1, [rows[3], rows[1]], above, torch.randn(2, HIDDEN, device=lm.device), 2e-4)
        above.select([1])
        check(lm, 1, [rows[1]], above, torch.randn(1, HIDDEN, device=lm.device), 2e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_key_and_value_are_the_projections_input_and_output(family: str) -> None:
    lm = make(family)
    rows = rows_of(lm)
    above = VariedRows(lm, 1, rows)
    module: Any = lm.module(lm.mlp_out(1))
    torch.testing.assert_close(module(above.key), above.value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_gradients_are_those_of_the_whole_model(family: str) -> None:
    lm = make(family)
    rows = rows_of(lm)[:2]
    delta = torch.zeros(2, HIDDEN, device=lm.device, requires_grad=True)
    logits = lm.head(VariedRows(lm, 2, rows)(delta))
    mine = sum(logits[i, len(r.ids) - 1 - r.position].log_softmax(-1)[7] for i, r in enumerate(rows))
    whole = sum(full(lm, 2, r, delta[i])[-1].log_softmax(-1)[7] for i, r in enumerate(rows))
    assert isinstance(mine, Tensor)
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, delta)[0] for x in (mine, whole)), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("family", DECODERS)
def test_a_bfloat16_model_runs_too(family: str) -> None:
    lm = make(family, torch.bfloat16)
    rows = rows_of(lm)
    delta = torch.zeros(len(rows), HIDDEN, device=lm.device)
    logits = lm.head(VariedRows(lm, 1, rows)(delta))
    for i, row in enumerate(rows):
        expected = full(lm, 1, row, delta[i])[row.position :].float().softmax(-1)
        torch.testing.assert_close(
            logits[i, : len(expected)].float().softmax(-1), expected, atol=0.05, rtol=0.3
        )


def test_an_encoder_decoder_model_is_refused_with_what_would_work() -> None:
    with pytest.raises(Unsupported, match=r"t5 is an encoder-decoder model; use ft, lora"):
        VariedRows(make("t5"), 1, [VariedRow((1, 2), 0)])
