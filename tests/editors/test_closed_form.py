"""The closed-form methods against independent dense solutions in float64, and against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editors import METHODS
from editors.closed_form.batch_params import softened
from editors.closed_form.contexts import target_contexts
from editors.closed_form.memit import Memit
from editors.closed_form.prior_keys import prior_keys
from editors.closed_form.solve import collapse, rank_one, solved_keys, update
from editors.closed_form.values import anchored, find_values
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.method import EditContext, Prior
from editors.metric import Metric, Projector
from editors.model.activations import record
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, save
from editors.patch_kinds import load
from tests import device
from tests.editors.conftest import StatisticsOf
from tests.families import make

EDITS = (
    Edit(subject="France", prompt="The capital of {} is", target="Berlin"),
    Edit(subject="Danielle Darrieux", prompt="The mother tongue of {} is", target="Russian"),
    Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi"),
)
BATCH = ("memit", "pmet", "emmet", "r_rome", "alphaedit")


@dataclass(frozen=True)
class Problem:
    """A small random one, float64: C (d, d), K (d, n), earlier keys Kp (d, p), R (m, n)."""

    c: Tensor
    k: Tensor
    kp: Tensor
    r: Tensor

    @classmethod
    def of(cls, seed: int, n: int = 3, d: int = 8, p: int = 2, m: int = 5) -> Problem:
        g = torch.Generator().manual_seed(seed)
        samples = torch.randn(d, 4 * d, generator=g, dtype=torch.float64)
        draw = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((d, n), (d, p), (m, n))]
        return cls(samples @ samples.t() / (4 * d), *draw)

    def ours(self, inverse: Any, weight: float, mu: float = 0.0, earlier: bool = False) -> Tensor:
        """The delta our mechanism gives, dense."""
        keys = self.k.t().float()
        solved = solved_keys(keys, inverse, self.kp.t().float() if earlier else None, mu)
        return update(self.r.t().float(), keys, solved, weight, 0.0).dense().double()


def metric(c: Tensor) -> Metric:
    return Metric.of(c.float(), 0.0, torch.device(device.chosen))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-3) -> bool:
    return float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


seeds = st.integers(0, 10_000)
weights = st.floats(0.05, 20.0)


@given(seeds, weights)
@settings(max_examples=25, deadline=None)
def test_memit_is_the_dense_least_squares_solution(seed: int, weight: float) -> None:
    """delta = R K^T (lambda C + Kp Kp^T + K K^T)^-1 (MEMIT, eq. 14)."""
    q = Problem.of(seed)
    dense = q.r @ q.k.t() @ torch.linalg.inv(weight * q.c + q.kp @ q.kp.t() + q.k @ q.k.t())
    assert close(q.ours(metric(q.c), weight, weight, earlier=True), dense)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_emmet_is_the_dense_equality_constrained_solution(seed: int) -> None:
    """delta K = R with the least tr(delta C delta^T), by the system of Karush, Kuhn and Tucker."""
    q = Problem.of(seed)
    d, n = q.k.shape
    system = torch.zeros(d + n, d + n, dtype=torch.float64)
    system[:d, :d], system[:d, d:], system[d:, :d] = q.c, q.k, q.k.t()
    right = torch.cat([torch.zeros(d, q.r.shape[0], dtype=torch.float64), q.r.t()])
    dense = torch.linalg.solve(system, right)[:d].t()
    ours = q.ours(metric(q.c), 0.0)
    assert close(ours, dense)
    assert close(ours @ q.k, q.r)


@given(seeds, weights, st.floats(0.05, 0.6))
@settings(max_examples=25, deadline=None)
def test_alphaedit_is_the_dense_null_space_solution(seed: int, weight: float, energy: float) -> None:
    """delta = R K^T P (Kp Kp^T P + K K^T P + lambda I)^-1 (AlphaEdit, eq. 12), with P from an independent SVD."""
    q = Problem.of(seed)
    u, s, _ = torch.linalg.svd(q.c)  # descending
    kept = s.flip(0).cumsum(0) / s.sum() <= energy
    q0 = u.flip(1)[:, kept]
    p = q0 @ q0.t()
    ours = Projector.of(q.c.float(), energy, torch.device(device.chosen))
    eye = torch.eye(len(p), dtype=torch.float64)
    assert (ours.solve(eye.float()).double() - p).abs().max() < 1e-4
    system = q.kp @ q.kp.t() @ p + q.k @ q.k.t() @ p + weight * eye
    dense = q.r @ q.k.t() @ p @ torch.linalg.inv(system)
    delta = q.ours(ours, weight, weight, earlier=True)
    assert (delta - dense).norm() < 2e-3 * max(1e-3, float(dense.norm()))
    assert (delta @ (eye - p)).norm() < 1e-3 * max(1.0, float(delta.norm()))  # other directions are not read


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_emmet_with_one_key_is_rome(seed: int) -> None:
    q = Problem.of(seed, n=1)
    u = torch.linalg.solve(q.c, q.k[:, 0])
    rome = torch.outer(q.r[:, 0], u / (u @ q.k[:, 0]))
    assert close(q.ours(metric(q.c), 0.0), rome)
    assert close(rank_one(q.r[:, 0].float(), q.k.t().float(), metric(q.c)).dense(), rome)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_memit_tends_to_emmet_as_typical_keys_lose_weight(seed: int) -> None:
    q = Problem.of(seed)
    emmet = q.ours(metric(q.c), 0.0)
    off = [float((q.ours(metric(q.c), w) - emmet).norm() / emmet.norm()) for w in (1.0, 1e-2, 1e-5)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-2


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_the_keys_of_earlier_edits_are_not_moved(seed: int) -> None:
    q = Problem.of(seed)
    delta = q.ours(metric(q.c), 0.0, 0.0, earlier=True)
    assert (delta @ q.kp).norm() < 2e-3 * delta.norm() * q.kp.norm()
    assert close(delta @ q.k, q.r, 5e-3)


def test_keys_of_one_subject_are_summed_into_one_row() -> None:
    q = Problem.of(1, n=4)
    residuals = q.r[:, [0, 0, 0, 3]].t().float()
    each = update(residuals, q.k.t().float(), solved_keys(q.k.t().float(), metric(q.c)), 0.1)
    folded = collapse(each, [3, 1])
    assert folded.left.shape == (5, 2)
    assert close(folded.dense(), each.dense(), 1e-5)


def test_identical_keys_do_not_break_the_equality_constraints() -> None:
    q = Problem.of(2)
    keys = q.k[:, [0, 0, 1]].t().float()
    delta = update(q.r.t().float(), keys, solved_keys(keys, metric(q.c)), 0.0)
    assert torch.isfinite(delta.dense()).all()
    mean = (q.r[:, 0] + q.r[:, 1]) / 2  # contradictory values meet in the middle
    assert close(delta.dense().double() @ q.k[:, 0], mean, 1e-2)


def test_anchoring_keeps_the_norm_of_the_hidden_state() -> None:
    g = torch.Generator().manual_seed(0)
    states, deltas = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    deltas[3] = 0
    found = anchored(states, deltas)
    torch.testing.assert_close((states + found).norm(dim=1), states.norm(dim=1))
    cosines = torch.nn.functional.cosine_similarity(states + found, states + deltas)
    torch.testing.assert_close(cosines, torch.ones(4))
    assert not found[3].any()


# --- on models ------------------------------------------------------------------------------------


def quick(method: str, **more: Any) -> Any:
    return METHODS[method].params(**{"max_steps": 3, **more})


def compute(lm: LM, method: str, context: EditContext, *edits: Edit, **more: Any) -> WeightPatch:
    patch = METHODS[method].compute(lm, edits, quick(method, **more), context)
    assert isinstance(patch, WeightPatch)
    return patch


def bits(patch: Patch) -> bytes:
    return save(patch)


@pytest.mark.parametrize("method", BATCH)
def test_a_fact_taken_out_leaves_what_a_batch_of_the_same_keys_and_values_gives(
    method: str, statistics_of: StatisticsOf
) -> None:
    """The dense solution of the stored keys and residuals of the rows left, in float64."""
    lm = make("llama")
    context = EditContext(statistics_of(lm))
    patch = compute(lm, method, context, *EDITS, layers=(0, 1))
    some = METHODS[method].subset(load(save(patch)), [0, 2], context.statistics)
    assert isinstance(some, WeightPatch)
    for name, delta in some.deltas.items():
        counts = some.extra["counts"]
        k = some.extra[f"{name}:keys"].double().t()
        u = some.extra[f"{name}:solved"].double().t()
        r = some.extra[f"{name}:residuals"].double().repeat_interleave(counts, 0).t() * some.extra["moved"]
        gram = k.t() @ u
        least = 1e-7 * gram.diagonal().mean()
        eye = torch.eye(len(gram), dtype=torch.float64)
        dense = r @ torch.linalg.inv(gram + (some.info["weights"][name] + least) * eye) @ u.t()
        assert close(delta.dense(), dense)
    again = METHODS[method].subset(some, [0, 1], context.statistics)
    assert bits(again) == bits(some)  # out of a smaller batch as out of the larger one


@pytest.mark.parametrize("method", BATCH)
def test_what_a_fact_contributes_does_not_depend_on_its_batch(
    method: str, statistics_of: StatisticsOf
) -> None:
    """Keys and residuals of a row are those of the fact alone, through every layer, but for rounding."""
    lm = make("gpt2")
    context = EditContext(statistics_of(lm))
    more = {"layers": (0, 1, 2), "rough": False}
    whole = compute(lm, method, context, *EDITS, **more)
    alone = compute(lm, method, context, EDITS[1], **more)
    some = METHODS[method].subset(whole, [1], context.statistics)
    for name, tensor in alone.extra.items():
        if not name.endswith(":solved"):
            torch.testing.assert_close(some.extra[name], tensor, atol=2e-3, rtol=2e-2)


def test_emmet_and_rome_agree_on_one_fact_of_a_model(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    context = EditContext(statistics_of(lm))
    same: dict[str, Any] = {"stop_probability": 0.9, "clamp": 4.0, "lr": 1.0, "contexts": 3, "wordings": 2}
    rome = compute(lm, "rome", context, EDITS[0], layer=1, **same)
    emmet = compute(lm, "emmet", context, EDITS[0], layers=(1,), hold_targets=False, **same)
    (one,), (other,) = rome.deltas.values(), emmet.deltas.values()
    assert close(one.dense(), other.dense(), 1e-4)


@pytest.mark.parametrize("method", ["rome", *BATCH])
def test_earlier_edits_constrain_until_they_are_reverted(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    free = EditContext(statistics_of(lm))
    place = {"layer": 1} if method == "rome" else {"layers": (1,)}
    first = compute(lm, method, free, EDITS[0], EDITS[2], **place)
    with_first = EditContext(statistics_of(lm), [Prior(method, first, (0, 1))])
    plain = compute(lm, method, free, EDITS[1], **place)
    held = compute(lm, method, with_first, EDITS[1], **place)
    name = lm.mlp_out(1)
    k = first.extra[f"{name}:keys"].t()
    moved = [float((p.deltas[name].dense() @ k).norm()) for p in (plain, held)]
    assert moved[1] < 0.6 * moved[0]
    assert bits(compute(lm, method, EditContext(statistics_of(lm), []), EDITS[1], **place)) == bits(plain)
    assert bits(compute(lm, method, with_first, EDITS[1], remember=False, **place)) == bits(plain)
    one = METHODS[method].subset(first, [0], free.statistics)  # one of the two was reverted
    less = compute(lm, method, EditContext(statistics_of(lm), [Prior(method, one, (0,))]), EDITS[1], **place)
    assert bits(less) not in (bits(plain), bits(held))


@pytest.mark.parametrize("method", ["memit", "pmet"])
def test_the_shares_of_the_layers_add_up_to_the_value(method: str, statistics_of: StatisticsOf) -> None:
    """With every key mapped exactly, the last layer's state is what was sought (MEMIT, eq. 20)."""
    lm = make("llama")
    context = EditContext(statistics_of(lm))
    params: dict[str, Any] = {"layers": (0, 1, 2), "weight": 0.0, "contexts": 1, "rough": False}
    params |= {"wordings": 0}
    patch = compute(lm, method, context, EDITS[1], **params)
    found = find_values(lm, 2, [EDITS[1]], quick(method, **params), attention=method == "pmet")
    ids, mask = lm.pad([found_ids(lm, EDITS[1])])
    states = []
    for deltas in ({}, {n: [d] for n, d in patch.deltas.items()}):
        with lm.patched(deltas), torch.no_grad(), record({"last": lm.layers[2]}, stop=True) as seen:
            lm.base_model(input_ids=ids, attention_mask=mask)
        states.append(seen["last"][0, position(lm, EDITS[1])])
    moved = (states[1] - states[0]).cpu()
    off = 0.2 if method == "memit" else 1.0  # the weights also move the tokens before, a little
    assert close(moved, found.deltas[0], off)
    assert torch.nn.functional.cosine_similarity(moved, found.deltas[0], dim=0) > 0.9


def found_ids(lm: LM, edit: Edit) -> tuple[int, ...]:
    return target_contexts(lm, edit, 1)[0].row.ids


def position(lm: LM, edit: Edit) -> int:
    return target_contexts(lm, edit, 1)[0].row.position


def test_a_change_is_not_spread_where_a_norm_stands_in_between(statistics_of: StatisticsOf) -> None:
    lm = make("gemma2")
    assert Memit().resolve(lm, quick("memit")).layers is not None
    with pytest.raises(InvalidEdit, match="name one layer"):
        compute(lm, "memit", EditContext(statistics_of(lm)), EDITS[0], layers=(0, 1))


@pytest.mark.parametrize("method", ["rome", *BATCH])
def test_a_stored_patch_has_the_keys_that_later_edits_hold_still(
    method: str, statistics_of: StatisticsOf
) -> None:
    """The keys survive saving and loading, and are the ones that `earlier_keys` hands to the next edit."""
    lm = make("llama")
    patch = load(save(compute(lm, method, EditContext(statistics_of(lm)), *EDITS)))
    assert isinstance(patch, WeightPatch)
    assert patch.deltas
    for name in patch.deltas:
        d_in = lm.weight(name).shape[1]
        keys = prior_keys([Prior(method, patch, (0, 1, 2))], name)
        assert keys is not None
        assert torch.equal(keys, patch.extra[f"{name}:keys"].float())
        assert keys.shape == (int(patch.extra["counts"].sum()), d_in)


def test_a_low_rank_row_belongs_to_one_fact(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    patch = compute(lm, "memit", EditContext(statistics_of(lm)), *EDITS)
    for delta in patch.deltas.values():
        assert isinstance(delta, LowRank)
        assert delta.left.shape[1] == len(EDITS)


@pytest.mark.parametrize("method", BATCH)
def test_a_fact_on_top_of_many_is_written_more_gently(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    few = compute(lm, method, EditContext(statistics_of(lm)), *EDITS, layers=(1,), clamp=3.0)
    prior = [Prior(method, few, (0, 1, 2))] * 20
    many = EditContext(statistics_of(lm), prior)
    softer = compute(lm, method, many, EDITS[1], layers=(1,), clamp=3.0)
    batch = compute(lm, method, many, *EDITS, layers=(1,), clamp=3.0)
    as_asked = compute(lm, method, many, EDITS[1], layers=(1,), clamp=3.0, soften=False)
    assert few.info["clamp"] == as_asked.info["clamp"] == 3.0
    assert 2.0 < softer.info["clamp"] < 3.0
    assert batch.info["clamp"] == softer.info["clamp"]  # or a batch without a fact would be another


@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0.1, 10))
def test_the_clamp_never_grows_with_the_facts_before_and_keeps_two_thirds(
    a: int, b: int, clamp: float
) -> None:
    low, high = sorted((a, b))
    assert clamp >= softened(clamp, low) >= softened(clamp, high) >= 2 / 3 * clamp
    assert softened(clamp, min(a, 30)) == clamp
