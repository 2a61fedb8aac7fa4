"""A weight under many deltas is made from a kept sum of the first ones, with the bits of adding all of them."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.model.deltas import Delta, Dense, LowRank, rebuilt
from server.transaction.partial_sums import MOST, STEP, PartialSums, _least_missed

SHAPE = (4, 3)
GENERATOR = torch.Generator().manual_seed(0)


def random_delta(i: int) -> Delta:
    if i % 5 == 4:
        return Dense(torch.randn(SHAPE, generator=GENERATOR))
    left = torch.randn(SHAPE[0], 1 + i % 2, generator=GENERATOR)
    return LowRank(left, torch.randn(1 + i % 2, SHAPE[1], generator=GENERATOR))


DELTAS = [random_delta(i) for i in range(300)]
PRISTINE = torch.randn(SHAPE, generator=GENERATOR)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Delta]:
    """Every delta that is added to a weight."""
    seen: list[Delta] = []
    for kind in (LowRank, Dense):
        really = kind.add_to

        def add(self: Delta, weight: torch.Tensor, really: object = really) -> None:
            seen.append(self)
            really(self, weight)  # type: ignore[operator]

        monkeypatch.setattr(kind, "add_to", add)
    return seen


@given(
    st.lists(
        st.tuples(st.integers(0, 299), st.lists(st.integers(0, 299), max_size=3)), min_size=1, max_size=12
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_every_stack_has_the_bits_of_adding_all_of_it(
    stacks: list[tuple[int, list[int]]], dtype: torch.dtype
) -> None:
    sums, live = PartialSums(), None
    pristine = PRISTINE.to(dtype)
    for count, without in stacks:
        wanted = [delta for i, delta in enumerate(DELTAS[:count]) if i not in without]
        new = sums.rebuilt("w", pristine, wanted, live)
        assert torch.equal(new, rebuilt(pristine, wanted))
        live = (wanted, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_more_edit_adds_one_delta_and_a_revert_what_comes_after_a_kept_sum(
    added: list[Delta], dtype: torch.dtype
) -> None:
    sums, live, pristine = PartialSums(), None, PRISTINE.to(dtype)
    for count in range(1, 257):
        added.clear()
        wanted = DELTAS[:count]
        live = (wanted, sums.rebuilt("w", pristine, wanted, live))
        assert len(added) == 1 or count <= STEP
    for base in (256, 255):  # the tries of one call stand on one stack
        added.clear()
        sums.rebuilt("w", pristine, DELTAS[:base], live)
        assert len(added) <= STEP
    for place in (255, 250, 224, 192, 128):
        added.clear()
        sums.rebuilt("w", pristine, [d for i, d in enumerate(DELTAS[:256]) if i != place], live)
        assert len(added) <= 2 * (256 - place) + STEP


def test_sums_are_few_and_closest_together_near_the_end() -> None:
    sums, live = PartialSums(), None
    for count in range(1, 301):
        live = (DELTAS[:count], sums.rebuilt("w", PRISTINE, DELTAS[:count], live))
    places = [len(each.deltas) for each in sums._kept["w"]]
    assert len(places) <= MOST
    assert places[-1] >= 300 - STEP
    assert _least_missed([32, 64, 96, 128], 128) in (0, 1)


def test_deltas_that_nothing_else_holds_are_let_go_with_their_sums() -> None:
    sums = PartialSums()
    deltas = [random_delta(i) for i in range(2 * STEP)]
    sums.rebuilt("w", PRISTINE, deltas, None)
    gone = ref(deltas[0])
    del deltas[:]
    gc.collect()
    assert gone() is None
    wanted = [random_delta(i) for i in range(2 * STEP + 1)]
    assert torch.equal(sums.rebuilt("w", PRISTINE, wanted, None), rebuilt(PRISTINE, wanted))
    assert all(each.is_of_use for each in sums._kept["w"])


def test_large_weights_are_not_kept_twice() -> None:
    sums = PartialSums(most_bytes=100)
    sums.rebuilt("w", PRISTINE, DELTAS, None)
    assert not sums._kept
    few = PartialSums(most_bytes=48 * MOST)
    for name in ("a", "b"):
        few.rebuilt(name, PRISTINE, DELTAS, None)
    assert few._bytes <= 48 * MOST
    assert list(few._kept) == ["b"]


def test_only_sums_that_stay_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    really = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: (copies.append(1), really(t))[1])
    sums = PartialSums()
    sums.rebuilt("w", PRISTINE, DELTAS, None)
    assert len(copies) == len(sums._kept["w"]) == MOST
