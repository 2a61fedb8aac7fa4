"""Texts that are read side by side in one row have the states that they have by themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.model import packing
from editors.model.activations import record
from editors.model.lm import LM
from editors.model.packing import may_pack, packs, read_packed
from tests.families import make

TEXTS = ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [10], [5, 6, 7, 8, 11], [8, 7, 6, 5])


def states(lm: LM, text: list[int]) -> torch.Tensor:
    with record({"last": lm.layers[-1]}) as seen, torch.no_grad():
        lm.base_model(input_ids=torch.tensor([text], device=lm.device), use_cache=False)
    return seen["last"][0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gptj"])
def test_a_text_beside_others_has_the_states_that_it_has_alone(family: str) -> None:
    lm = make(family)
    assert may_pack(lm, 20)
    packed = read_packed(lm, TEXTS)
    assert len(packed.states) == 11, "a beginning is read once"
    rows, mask = packed.columns([0, 4], 6)
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert rows.layers[0].keys.shape[0::2] == (2, 6)
    for text, path in zip(TEXTS, packed.places, strict=True):
        torch.testing.assert_close(packed.states[path], states(lm, text), rtol=1e-4, atol=1e-5)


def test_a_model_with_recurrent_layers_reads_each_text_by_itself() -> None:
    assert not may_pack(make("lfm2"), 20)


def test_a_model_that_does_not_read_them_so_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    monkeypatch.setattr(packing, "SAME", {torch.float32: 0.0})
    lm._extensions.pop(packing._SideBySide, None)
    assert not may_pack(lm, 20)
    lm._extensions.pop(packing._SideBySide)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=12))
def test_groups_hold_every_text_once_and_no_more_beginnings_than_there_is_room_for(
    texts: list[list[int]],
) -> None:
    lm = make("llama")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "TOKENS", 10)
        groups = packs(lm, texts)
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    for group in groups:
        beginnings = {tuple(texts[i][:n]) for i in group for n in range(1, len(texts[i]) + 1)}
        assert len(beginnings) <= 10
