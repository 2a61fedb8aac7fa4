"""Texts go through the model in batches that cost least, counted in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editors.model.batching import CPU_PASS, grouped
from tests.families import make


def cost(batches: Sequence[Sequence[int]], lengths: Sequence[int], extra: Sequence[int], one: int) -> int:
    """Tokens with padding, and passes, of all batches."""
    total = 0
    for batch in batches:
        most = max(extra[i] for i in batch)
        total += len(batch) * (max(lengths[i] for i in batch) + most) + one * (1 + most)
    return total


TEXTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 24)), max_size=24)


@given(TEXTS, st.integers(40, 400), st.integers(0, 600))
def test_every_text_is_in_one_batch_and_no_batch_is_too_large(
    texts: list[tuple[int, int]], room: int, one: int
) -> None:
    lengths, extra = [t[0] for t in texts], [t[1] for t in texts]
    batches = grouped(lengths, extra, room, one)
    assert sorted(i for batch in batches for i in batch) == list(range(len(texts)))
    for batch in batches:
        size = len(batch) * (max(lengths[i] for i in batch) + max(extra[i] for i in batch))
        assert size <= room or len(batch) == 1


@given(TEXTS.filter(bool), st.integers(0, 600))
def test_no_way_to_cut_the_sorted_texts_in_two_costs_less(texts: list[tuple[int, int]], one: int) -> None:
    lengths, extra = [t[0] for t in texts], [t[1] for t in texts]
    found = cost(grouped(lengths, extra, 10**6, one), lengths, extra, one)
    order = sorted(range(len(texts)), key=lambda i: texts[i])
    runs = [i for i in range(1, len(order)) if texts[order[i]] != texts[order[i - 1]]]
    assert found <= cost([order], lengths, extra, one)
    assert all(found <= cost([order[:at], order[at:]], lengths, extra, one) for at in runs)


def test_short_statements_do_not_wait_for_long_questions() -> None:
    lengths = [5, 5, 5, 5, 6, 6, 6, 8, 8, 8, 9, 16, 36, 37, 38, 43]
    extra = [6] * 12 + [24] * 4
    batches = grouped(lengths, extra, 4096, CPU_PASS)
    assert {12, 13, 14, 15} <= set(batches[-1]) <= {11, 12, 13, 14, 15}
    one_batch = cost([range(16)], lengths, extra, CPU_PASS)
    assert cost(batches, lengths, extra, CPU_PASS) < 0.75 * one_batch


@pytest.mark.parametrize("device_cost", [0, 10**9])
def test_what_a_pass_costs_does_not_change_what_is_said(
    monkeypatch: pytest.MonkeyPatch, device_cost: int
) -> None:
    lm = make("llama")
    texts = [
        "Paris",
        "The capital of France is",
        "The mother tongue of the old man who lives in Rome is",
        "Rome",
    ]
    prompts = [lm.prompt(t, chat=False) for t in texts]
    alone = [lm.generate([p], n)[0].text for p, n in zip(prompts, (3, 9, 5, 7), strict=True)]
    monkeypatch.setattr("editors.model.text.pass_cost", lambda device: device_cost)
    assert [g.text for g in lm.generate(prompts, [3, 9, 5, 7])] == alone
