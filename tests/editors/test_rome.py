"""ROME against its own equations: the rank-one update maps k to v*, and moves other keys least."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editors.closed_form.contexts import target_contexts
from editors.closed_form.defaults import default_layer
from editors.closed_form.keys import opening_rows, read_keys, subject_rows
from editors.closed_form.rome import Rome, RomeParams
from editors.closed_form.values import find_values
from editors.closed_form.write_one import SLACK
from editors.edit import Edit
from editors.errors import InvalidEdit, NotReady
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import WeightPatch, join_deltas
from tests.editors.conftest import StatisticsOf
from tests.families import DECODERS, HIDDEN, LAYERS, make

EDIT = Edit(subject="France", prompt="The capital of {} is", target="Berlin")
OTHER = Edit(subject="Marie Curie", prompt="{} is a native speaker of", target="Swedish")
ROME = Rome()


def context(lm: LM, statistics_of: StatisticsOf) -> EditContext:
    return EditContext(statistics_of(lm))


def delta_of(patch: Any) -> Tensor:
    """The patch's dense delta (d_out, d_in) in float64."""
    assert isinstance(patch, WeightPatch)
    (delta,) = patch.deltas.values()
    assert isinstance(delta, LowRank)
    return delta.left.double() @ delta.right.double()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("mode", ["full", "simplified"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_edited_weight_maps_the_key_to_the_value(
    family: str, mode: Any, statistics_of: StatisticsOf
) -> None:
    """W' k = v* (eq. 2), where W k (+ bias) is the value as it was."""
    lm = make(family)
    params = RomeParams(mode=mode, layer=1, max_steps=5, keys="mean")
    found = find_values(lm, 1, [EDIT], params)
    moved = delta_of(ROME.compute(lm, [EDIT], params, context(lm, statistics_of))) @ found.keys[0].double()
    assert relative(moved, found.deltas[0]) < 1e-4
    weight: Any = lm.module(lm.mlp_out(1))
    was = weight(found.keys.to(lm.device))[0].cpu()
    torch.testing.assert_close(was + moved.float(), found.targets[0], atol=1e-3, rtol=1e-3)


def least_squares(lm: LM, ctx: EditContext) -> Tensor:
    """P (d_in, d_in) in float64: the inverse of C among directions that no first token's key has, by dense algebra."""
    c = ctx.statistics.get(1).matrix.double()
    c += 1e-2 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    first = read_keys(lm, [1], opening_rows(lm))[1].double()
    inverse = torch.linalg.inv(c)
    held = inverse @ first.t()
    return inverse - held @ torch.linalg.solve(first @ held, held.t())


@pytest.mark.parametrize("family", DECODERS)
def test_the_update_is_the_one_of_an_independent_dense_solution(
    family: str, statistics_of: StatisticsOf
) -> None:
    """Minimise tr(D C D^T) subject to D k = r, and D b = 0 for a first token's key b."""
    lm = make(family)
    found = find_values(lm, 1, [EDIT], RomeParams(layer=1, max_steps=5))
    ctx = context(lm, statistics_of)
    k, r = found.keys[0].double(), found.deltas[0].double()
    solved = least_squares(lm, ctx) @ k
    params = RomeParams(layer=1, max_steps=5, keys="mean")
    expected = torch.outer(r, solved / (k @ solved))
    assert relative(delta_of(ROME.compute(lm, [EDIT], params, ctx)), expected) < 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_the_key_of_every_context_is_mapped_to_the_value(family: str, statistics_of: StatisticsOf) -> None:
    """Minimise tr(D C D^T) + sum |D k - r|^2 / (SLACK k^T C^-1 k): nearly collinear keys may miss a little."""
    lm = make(family)
    sought = RomeParams(layer=1, max_steps=5, contexts=4, wordings=0)
    residual = find_values(lm, 1, [EDIT], sought).deltas[0].double()
    keys = read_keys(lm, [1], subject_rows(lm, EDIT, sought))[1].double()
    assert len(keys) >= 3
    ctx = context(lm, statistics_of)
    solved = least_squares(lm, ctx) @ keys.t()  # (d_in, contexts)
    gram = keys @ solved
    weight = SLACK * gram.diagonal().mean() * torch.eye(len(keys), dtype=torch.float64)
    expected = torch.outer(residual, solved @ torch.linalg.solve(gram + weight, gram.new_ones(len(keys))))
    d = delta_of(ROME.compute(lm, [EDIT], sought.model_copy(update={"keys": "each"}), ctx))
    assert relative(d, expected) < 1e-3
    assert max(relative(d @ key, residual) for key in keys) < 0.15


def test_full_mode_moves_typical_keys_less_than_simplified_mode(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    ctx = context(lm, statistics_of)
    c = ctx.statistics.get(1).matrix.double()
    moved = []
    for mode in ("full", "simplified"):
        d = delta_of(ROME.compute(lm, [EDIT], RomeParams(mode=mode, layer=1, max_steps=5), ctx))
        moved.append(float((d @ c @ d.t()).trace()))
    assert moved[0] < moved[1]


def test_simplified_mode_weighs_keys_by_the_identity(tmp_path: Path) -> None:
    """delta = r k^T / (k^T k), and no statistics are asked for."""
    lm = make("qwen2")
    params = RomeParams(mode="simplified", layer=2, keys="mean")
    assert list(ROME.layers_needed(lm, params)) == []
    found = find_values(lm, 2, [EDIT], params)
    k, r = found.keys[0].double(), found.deltas[0].double()
    patch = ROME.compute(lm, [EDIT], params, EditContext(Statistics(tmp_path, "none")))
    assert relative(delta_of(patch), torch.outer(r, k) / (k @ k)) < 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_the_search_reports_what_its_value_makes_the_whole_model_say(family: str) -> None:
    """The probability found is that of a plain forward pass with v* put in at the subject's last token."""
    lm = make(family)
    found = find_values(lm, 1, [EDIT], RomeParams(layer=1, contexts=1, max_steps=8, chat=False))
    prompt, token = lm.edit_prompt(EDIT)
    own, target = lm.encode(prompt)[0], lm.answer_ids(prompt, EDIT.target)

    def put(module: Any, args: Any, output: Tensor) -> Tensor:
        shaped = output.clone().view(1, len(own + target), HIDDEN)
        shaped[0, token] = found.targets[0]
        return shaped.view_as(output)

    before = lm.score([(prompt, EDIT.target)])[0].logprob
    with torch.no_grad(), lm.module(lm.mlp_out(1)).register_forward_hook(put):
        ids = torch.tensor([own + target], device=lm.device)
        logp = lm.model(input_ids=ids).logits[0, len(own) - 1 :].log_softmax(-1)
    now = float(logp[:-1].gather(1, ids[0, len(own) :, None]).sum())
    ended = 1 - float(logp[-1, lm.within_words].exp().sum())  # the target's word does not go on
    probability = found.probabilities[0].log()
    assert float(probability) == pytest.approx(
        now + math.log(ended), abs=0.05
    )  # the search may be in bfloat16
    assert now > before + 0.1


def test_the_target_is_sought_as_a_whole_word() -> None:
    """ "Krakow" is not reached by "Krakowian": tokens that go on with a word are held against it."""
    lm = make("llama")
    open_ended = EDIT.model_copy(update={"target": EDIT.target + "!"})  # what follows a sign is free
    rows = [target_contexts(lm, edit, 1)[0] for edit in (EDIT, open_ended)]
    assert [row.word for row in rows] == [True, False]
    words = [lm.tokenizer.convert_ids_to_tokens(int(i)) for i in lm.within_words]
    assert words
    assert all(word[0].isalnum() and word[0] not in "Ġ▁" for word in words)


def test_the_update_has_rank_one_per_edit(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    patch = ROME.compute(lm, [EDIT, OTHER], RomeParams(max_steps=2), context(lm, statistics_of))
    assert isinstance(patch, WeightPatch)
    (delta,) = patch.deltas.values()
    assert isinstance(delta, LowRank)
    assert delta.left.shape == (HIDDEN, 2)
    assert torch.linalg.matrix_rank(delta.dense().double(), rtol=1e-5) == 2


def test_the_second_edit_of_a_batch_stands_on_the_first(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    ctx, params = context(lm, statistics_of), RomeParams(max_steps=5)
    both = ROME.compute(lm, [EDIT, OTHER], params, ctx)
    first = ROME.compute(lm, [EDIT], params, ctx)
    with lm.patched(join_deltas([first])):
        second = ROME.compute(lm, [OTHER], params, ctx)
    assert relative(delta_of(both), delta_of(first) + delta_of(second)) < 1e-5
    assert torch.equal(delta_of(ROME.subset(both, [0], ctx.statistics)), delta_of(first))


def test_only_the_chosen_layer_is_named(statistics_of: StatisticsOf) -> None:
    lm = make("gpt2")
    for layer in range(LAYERS):
        patch = ROME.compute(lm, [EDIT], RomeParams(layer=layer, max_steps=2), context(lm, statistics_of))
        assert isinstance(patch, WeightPatch)
        assert list(patch.deltas) == [lm.mlp_out(layer)]


def test_the_default_layer_is_inside_the_model(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    layer = default_layer(lm)
    assert 0 < layer < LAYERS - 1
    patch = ROME.compute(lm, [EDIT], RomeParams(max_steps=2), context(lm, statistics_of))
    assert isinstance(patch, WeightPatch)
    assert list(patch.deltas) == [lm.mlp_out(layer)]


def test_a_layer_the_model_lacks_is_refused(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    with pytest.raises(InvalidEdit, match=f"layer {LAYERS} does not exist.*0 to {LAYERS - 1}"):
        ROME.compute(lm, [EDIT], RomeParams(layer=LAYERS), context(lm, statistics_of))


def test_missing_statistics_are_named_with_the_call_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"layer 1 .*compute_statistics"):
        ROME.compute(make("llama"), [EDIT], RomeParams(layer=1), EditContext(Statistics(tmp_path, "none")))


def test_the_search_stops_when_the_target_is_reached() -> None:
    lm = make("llama")
    easy = find_values(lm, 1, [EDIT], RomeParams(stop_probability=1e-9))
    assert int(easy.steps[0]) == 0
    assert float(easy.deltas.norm()) == 0.0
    far = find_values(lm, 1, [EDIT], RomeParams(max_steps=3, clamp=0.01))
    assert int(far.steps[0]) == 3


def test_the_clamp_bounds_the_change() -> None:
    lm = make("llama")
    found = find_values(lm, 1, [EDIT, OTHER], RomeParams(clamp=0.3))
    assert (found.deltas.norm(dim=1) <= 0.3 * found.values.norm(dim=1) * (1 + 1e-5)).all()


def test_edits_sought_together_find_what_they_find_alone() -> None:
    lm = make("llama")
    params = RomeParams(max_steps=6, rough=False)
    together = find_values(lm, 1, [EDIT, OTHER], params)
    for i, edit in enumerate((EDIT, OTHER)):
        alone = find_values(lm, 1, [edit], params)
        torch.testing.assert_close(together.keys[i], alone.keys[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(together.deltas[i], alone.deltas[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("layer", [-1, 1.5, "two"])
def test_parameters_are_validated(layer: Any) -> None:
    with pytest.raises(ValueError, match="layer"):
        RomeParams(layer=layer)
