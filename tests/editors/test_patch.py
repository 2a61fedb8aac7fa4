"""Patches: exact on disk, nothing but patches is read, and rebuilding leaves no trace of what was removed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editors import METHODS
from editors.errors import EditError
from editors.model.deltas import Delta, Dense, LowRank, rebuilt
from editors.patch import WeightPatch, join_deltas, save
from editors.patch_kinds import KINDS, load
from tests.conftest import ROOT

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_delta(seed: int, d_out: int = 6, d_in: int = 5, rank: int = 2) -> Delta:
    g = torch.Generator().manual_seed(seed)
    if seed % 3 == 0:
        return Dense(torch.randn(d_out, d_in, generator=g))
    return LowRank(torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g))


def some_patch(seed: int = 1) -> WeightPatch:
    deltas = {"layers.0.out.weight": random_delta(seed), "layers.1.out.weight": random_delta(seed + 1)}
    extra = {"key": torch.arange(4.0), "when": torch.tensor([3], dtype=torch.int64)}
    return WeightPatch(deltas, extra=extra, info={"steps": 7, "note": "ä😀", "nested": {"a": [1, 2.5, None]}})


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@given(st.integers(0, 10_000))
def test_what_is_saved_is_loaded_to_the_bit(seed: int) -> None:
    patch = some_patch(seed)
    back = load(save(patch))
    assert isinstance(back, WeightPatch)
    assert back.info == patch.info
    for mine, theirs in ((patch.tensors(), back.tensors()), (patch.extra, back.extra)):
        assert mine.keys() == theirs.keys()
        assert all(bits(mine[k]) == bits(theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)


def test_the_same_patch_gives_the_same_bytes() -> None:
    assert save(some_patch()) == save(load(save(some_patch())))


def test_special_values_survive() -> None:
    odd = torch.tensor([[-0.0, float("inf")], [1e-45, float("nan")]])
    back = load(save(WeightPatch({"w": Dense(odd)}))).tensors()
    assert bits(back["w:dense"]) == bits(odd)


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(EditError, match="not a patch file"):
        load(data)


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(share: float) -> None:
    data = save(some_patch())
    with pytest.raises(EditError):
        load(data[: int(share * len(data))])


def test_a_plain_safetensors_file_is_refused() -> None:
    with pytest.raises(EditError, match="not a patch file"):
        load(safetensors.torch.save({"w": torch.ones(2)}))


@pytest.mark.parametrize(
    "header",
    [
        {"format": "errata-patch-99", "kind": "weight", "info": "{}"},
        {"format": "errata-patch-1", "kind": "no such kind", "info": "{}"},
        {"format": "errata-patch-1", "kind": "weight", "info": "{"},
        {"format": "errata-patch-1", "kind": "weight"},
    ],
)
def test_a_header_of_another_make_is_refused(header: dict[str, str]) -> None:
    with pytest.raises(EditError):
        load(safetensors.torch.save({"t/w:dense": torch.ones(2, 2)}, metadata=header))


@pytest.mark.parametrize("name", ["t/w:left", "t/w:right", "t/w", "t/w:sideways"])
def test_half_a_delta_is_refused(name: str) -> None:
    header = {"format": "errata-patch-1", "kind": "weight", "info": "{}"}
    with pytest.raises(EditError):
        load(safetensors.torch.save({name: torch.ones(2, 2)}, metadata=header))


def test_low_rank_and_dense_say_the_same() -> None:
    low = LowRank(torch.randn(6, 2), torch.randn(2, 5))
    w = torch.randn(6, 5)
    torch.testing.assert_close(rebuilt(w, [low]), rebuilt(w, [Dense(low.dense())]))


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6, unique=True), st.data(), DTYPES)
def test_a_removed_delta_leaves_no_trace(seeds: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    pristine = torch.randn(6, 5, generator=torch.Generator().manual_seed(sum(seeds))).to(dtype)
    kept = list(seeds)
    kept.remove(data.draw(st.sampled_from(seeds)))
    rebuilt(pristine, [random_delta(s) for s in seeds])  # once applied ...
    after = rebuilt(pristine, [random_delta(s) for s in kept])  # ... and rebuilt without it
    never = pristine.clone().float()
    for s in kept:
        random_delta(s).add_to(never)
    assert bits(after) == bits(never.to(dtype))


@given(st.lists(st.integers(0, 10_000), max_size=4), DTYPES)
def test_rebuilding_leaves_pristine_weights_and_deltas_alone(seeds: list[int], dtype: torch.dtype) -> None:
    pristine = torch.randn(6, 5).to(dtype)
    deltas = [random_delta(s) for s in seeds]
    before = [bits(pristine), *(bits(d.dense()) for d in deltas)]
    made = rebuilt(pristine, deltas)
    assert [bits(pristine), *(bits(d.dense()) for d in deltas)] == before
    assert made.data_ptr() != pristine.data_ptr()
    assert made.dtype == dtype


@given(DTYPES)
def test_no_deltas_give_the_pristine_weights_to_the_bit(dtype: torch.dtype) -> None:
    pristine = torch.randn(6, 5).to(dtype)
    assert bits(rebuilt(pristine, [])) == bits(pristine)


def test_a_transposed_view_is_rebuilt_in_its_own_orientation() -> None:
    stored = torch.randn(5, 6)  # as Conv1D keeps it: (d_in, d_out)
    delta = random_delta(1)
    torch.testing.assert_close(rebuilt(stored.t(), [delta]), stored.t() + delta.dense())


def test_deltas_of_several_patches_keep_their_order() -> None:
    first, second = some_patch(1), some_patch(5)
    joined = join_deltas([first, second])
    for name, deltas in joined.items():
        assert deltas == [first.deltas[name], second.deltas[name]]


def test_every_patch_that_a_method_makes_can_be_loaded() -> None:
    assert {method.kind for method in METHODS.values()} <= set(KINDS)
    assert all(name == patch_class.kind for name, patch_class in KINDS.items())


def test_loading_a_patch_imports_no_editing_method() -> None:
    code = "import sys, editors.patch_kinds; print('editors.method' in sys.modules, 'editors.table' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@given(st.integers(0, 10_000), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.data())
def test_the_parts_of_some_edits_are_cut_out_of_a_low_rank_delta(
    seed: int, ranks: list[int], data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    parts = [LowRank(torch.randn(4, r, generator=g), torch.randn(r, 3, generator=g)) for r in ranks]
    whole = LowRank(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts]))
    edits = data.draw(st.lists(st.sampled_from(range(len(ranks))), min_size=1, unique=True))
    some = whole.select(edits, ranks)
    assert torch.equal(some.left, torch.cat([parts[i].left for i in edits], 1))
    assert torch.equal(some.right, torch.cat([parts[i].right for i in edits]))
    assert some.left.is_contiguous()
