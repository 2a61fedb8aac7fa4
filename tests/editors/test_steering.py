"""Steering on tiny models of every family: what a dose adds, where, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from editors.model.activations import first, record
from editors.model.lm import LM
from editors.patch import save
from editors.patch_kinds import load
from editors.steering.choices import Combine
from editors.steering.combining import combined
from editors.steering.directions import (
    answer_groups,
    first_component,
    fit_direction,
    mean_difference,
    separations,
    unit,
)
from editors.steering.lm_steer import train_output_map
from editors.steering.pairs import Pair
from editors.steering.prompt import instruction_sides
from editors.steering.stack import Dose, unsteered
from editors.steering.states import States, pair_states, sides_of
from editors.steering.vector import SteeringVector, dose_of, new_vector
from tests.families import DECODERS, FAMILIES, QUANTISED, fresh, make

PAIRS = [
    Pair(prompt="The film was", positive="a joy from start to end", negative="a bore from start to end"),
    Pair(prompt="Her day was", positive="happy and bright", negative="sad and dark"),
    Pair(positive="I love this town", negative="I hate this town"),
    Pair(prompt="What is it like?", positive="It is wonderful", negative="It is terrible"),
]
TEXTS = ("The capital of France is", "Big Ben is", "The mother tongue of Danielle Darrieux is French and")


def silent(fraction: float, message: str) -> None:
    return None


def vector_of(lm: LM, layers: tuple[int, ...] = (1, 2)) -> SteeringVector:
    states = pair_states(lm, sides_of(lm, PAIRS), "answer", silent)
    return new_vector("caa", layers, mean_difference(states.differences), states.norms, {})


@contextmanager
def steered(lm: LM, *doses: Dose) -> Iterator[None]:
    detach = [dose.attach(lm) for dose in doses]
    try:
        yield
    finally:
        for off in reversed(detach):
            off()


@torch.no_grad()
def logits(lm: LM, texts: tuple[str, ...] = TEXTS, left: bool = False) -> list[Tensor]:
    """Logits of every text, cut free of its padding."""
    rows = [lm.encode(lm.prompt(text, chat=False))[0] for text in texts]
    ids, mask = lm.pad(rows, left=left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if lm.is_seq2seq:
        out = lm.model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :3]).logits
        return list(out)
    extra = {} if lm.arch.family == "opt" else {"position_ids": positions}
    out = lm.model(input_ids=ids, attention_mask=mask, **extra).logits
    return [out[i][mask[i].bool()] for i in range(len(rows))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dose_changes_the_logits_and_off_is_bit_identical(family: str, dtype: torch.dtype) -> None:
    lm = make(family, dtype)
    before = logits(lm)
    dose = dose_of("mood", vector_of(lm), 0.5)
    with steered(lm, dose):
        on = logits(lm)
        with unsteered(lm):
            assert same(logits(lm), before)
    assert not same(on, before)
    assert same(logits(lm), before)
    assert not any(layer._forward_hooks for layer in lm.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dose_adds_multiplier_times_norm_along_the_direction(family: str) -> None:
    lm = make(family)
    vector = vector_of(lm, (1,))

    @torch.no_grad()
    def after_layer() -> Tensor:
        ids, mask = lm.pad([lm.encode(lm.prompt(TEXTS[0], chat=False))[0]])
        more = {"decoder_input_ids": ids} if lm.is_seq2seq else {}
        with record({"x": lm.layers[1]}) as seen:
            lm.model(input_ids=ids, attention_mask=mask, **more)
        return first(seen["x"])

    before = after_layer()
    with steered(lm, dose_of("mood", vector, 0.25)):
        moved = after_layer() - before
    expected = 0.25 * vector.norms[1] * vector.directions[1]
    torch.testing.assert_close(moved.cpu(), expected.expand_as(moved), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt_tokens", [True, False])
def test_a_batch_says_what_each_prompt_says_alone(family: str, prompt_tokens: bool) -> None:
    lm = make(family)
    prompts = [lm.prompt(text, chat=False) for text in TEXTS]
    with steered(lm, dose_of("mood", vector_of(lm), 0.5, prompt=prompt_tokens)):
        together = [g.text for g in lm.generate(prompts, 6)]
        alone = [lm.generate([p], 6)[0].text for p in prompts]
    assert together == alone


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("prompt_tokens", [True, False])
def test_generation_with_a_cache_is_what_scoring_finds_likeliest(family: str, prompt_tokens: bool) -> None:
    lm = make(family)
    ids, mask = lm.pad([lm.encode(lm.prompt(TEXTS[0], chat=False))[0]])
    last = ids.shape[1] - 1
    with steered(lm, dose_of("mood", vector_of(lm), 0.5, prompt=prompt_tokens)), lm.local.ending_at([last]):
        said = lm.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        with torch.no_grad():
            whole = lm.model(input_ids=said).logits[0, last:-1]
    ends = [*(e for e in [lm.model.generation_config.eos_token_id] if e is not None)]
    whole[:, ends] = -torch.inf  # min_new_tokens forbids them
    assert whole.argmax(-1).tolist() == said[0, last + 1 :].tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_padding_on_either_side_does_not_matter(family: str) -> None:
    lm = make(family)
    with steered(lm, dose_of("mood", vector_of(lm), 0.5)):
        for right, left in zip(logits(lm), logits(lm, left=True), strict=True):
            torch.testing.assert_close(right, left, rtol=1e-3, atol=1e-3)


def test_without_prompt_tokens_the_prompt_is_left_as_it_is() -> None:
    lm = make("llama")
    prompt = lm.prompt("The capital of France is", chat=False)
    length = len(lm.encode(prompt)[0])
    seen = {}
    for name, whole in (("all", True), ("answer", False)):
        with (
            steered(lm, dose_of("mood", vector_of(lm, (1,)), 0.5, prompt=whole)),
            record({"x": lm.layers[1]}) as states,
        ):
            lm.score([(prompt, "Paris and London")])
        seen[name] = states["x"][0]
    with record({"x": lm.layers[1]}) as states:
        lm.score([(prompt, "Paris and London")])
    base = states["x"][0]
    assert torch.equal(seen["answer"][: length - 1], base[: length - 1])
    assert not torch.equal(seen["answer"][length - 1], base[length - 1])
    assert torch.equal(seen["answer"][length - 1 :], seen["all"][length - 1 :])


def test_many_vectors_make_one_hook_per_layer() -> None:
    lm = fresh("gpt2")
    vector = vector_of(lm)
    with steered(lm, *(dose_of(f"v{i}", vector, 0.1) for i in range(5))):
        assert [len(layer._forward_hooks) for layer in lm.layers] == [0, 1, 1, 0]


def test_taking_a_middle_vector_off_is_as_if_it_had_never_been_on() -> None:
    lm = make("qwen2")
    doses = [dose_of(f"v{i}", vector_of(lm, (i,)), 0.3, "orthogonal") for i in (1, 2, 3)]
    with steered(lm, doses[0], doses[2]):
        expected = logits(lm)
    off = [dose.attach(lm) for dose in doses]
    off[1]()
    assert same(logits(lm), expected)
    off[0](), off[2]()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_saved_dose_and_a_saved_vector_come_back_to_the_bit(family: str) -> None:
    lm = make(family)
    vector = vector_of(lm)
    again = load(save(vector))
    assert isinstance(again, SteeringVector)
    assert torch.equal(again.directions, vector.directions)
    assert again.layers == vector.layers
    dose = dose_of("mood", vector, 0.3, "dare", prompt=False)
    other = load(save(dose))
    assert save(other) == save(dose)
    with steered(lm, dose):
        expected = logits(lm)
    assert isinstance(other, Dose)
    with steered(lm, other):
        assert same(logits(lm), expected)


def rules(combine: Combine, *values: Tensor) -> Tensor:
    doses = [Dose(str(i), 1.0, combine, True, {0: v}) for i, v in enumerate(values)]
    total = combined(doses, 0)
    assert total is not None
    return total


def test_the_rules_of_joining_are_those_stated() -> None:
    a, b = torch.tensor([2.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, -0.5, -4.0])
    torch.testing.assert_close(rules("add", a, b), a + b)
    rest = rules("orthogonal", a, b) - a
    assert abs(float(rest @ a)) < 1e-5
    # halves kept: (2, 0, 0, 1) and (0, 3, 0, -4); in the last entry -4 outweighs 1
    torch.testing.assert_close(rules("ties", a, b), torch.tensor([2.0, 3.0, 0.0, -4.0]))
    dropped = rules("dare", torch.ones(4000))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(float(dropped.mean()) - 1) < 0.1
    assert torch.equal(dropped, rules("dare", torch.ones(4000)))


def planted(noise: float) -> tuple[States, Tensor]:
    """States whose sides differ along a known direction at layer 1 alone."""
    generator = torch.Generator().manual_seed(3)
    direction = unit(torch.randn(16, generator=generator))
    base = torch.randn(40, 3, 16, generator=generator)
    positive, negative = base.clone(), base.clone()
    positive += noise * torch.randn(base.shape, generator=generator)
    negative += noise * torch.randn(base.shape, generator=generator)
    positive[:, 1] += 3 * direction
    return States(positive, negative, torch.ones(3)), direction


@pytest.mark.parametrize("method", [mean_difference, first_component])
def test_a_planted_direction_is_found_where_it_was_planted(method: object) -> None:
    states, direction = planted(0.5)
    find = mean_difference if method is mean_difference else first_component
    found = find(states.differences)
    assert float(found[1] @ direction) > 0.9
    told = separations(states, find)
    assert told is not None
    assert max(range(3), key=lambda i: told[i].d_prime) == 1
    assert told[1].accuracy > 0.95
    assert abs(told[0].accuracy - 0.5) < 0.35  # held out, so noise is not fitted


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_steer_learns_a_map_that_makes_the_texts_likelier(family: str) -> None:
    lm = fresh(family)
    before = logits(lm)
    found = train_output_map(lm, sides_of(lm, PAIRS), silent)
    assert found.loss_after < found.loss_before
    vector = new_vector(
        "lm_steer", (), torch.zeros(0, lm.d_model), torch.ones(1), {}, left=found.left, right=found.right
    )
    with steered(lm, dose_of("mood", vector, found.strength)):
        assert not same(logits(lm), before)
    assert same(logits(lm), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruction_becomes_a_vector(family: str) -> None:
    lm = make(family)
    states = pair_states(lm, instruction_sides(lm, "Be very cheerful.", "Be very gloomy."), "answer", silent)
    assert mean_difference(states.differences).shape == (lm.n_layers, lm.d_model)


def test_of_two_answers_only_the_behaviour_is_left_and_not_the_letter() -> None:
    generator = torch.Generator().manual_seed(5)
    letter, behaviour = unit(torch.randn(2, 1, 32, generator=generator)).unbind(0)
    pairs = [
        Pair(prompt="?", positive=a, negative=b) for a, b in [("(A)", "(B)")] * 14 + [("(B)", "(A)")] * 6
    ]
    groups = answer_groups(pairs)
    assert groups is not None
    noise = 0.1 * torch.randn(20, 1, 32, generator=generator)
    differences = 5 * groups[:, None, None] * letter + behaviour + noise
    found = fit_direction(differences, mean_difference, groups)
    assert float((found * behaviour).sum()) > 0.8
    assert abs(float((found * letter).sum())) < 0.1
    assert answer_groups(PAIRS) is None


@pytest.mark.parametrize("family", QUANTISED)
def test_every_kind_of_steering_acts_on_quantised_weights_and_is_off_to_the_bit(family: str) -> None:
    lm = make(family)
    before = logits(lm)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((lm.d_model, 2), (2, lm.d_model)))
    vector = new_vector("lm_steer", (), torch.zeros(0, lm.d_model), torch.ones(1), {}, left=left, right=right)
    direction = torch.nn.functional.normalize(torch.randn(lm.d_model, generator=generator), dim=0)
    ablation = replace(dose_of("mood", vector_of(lm), 0.5), added={}, ablated=direction)
    for dose in (dose_of("mood", vector_of(lm), 0.5), dose_of("map", vector, 0.5), ablation):
        with steered(lm, dose):
            assert not any(torch.allclose(x, y, atol=1e-4) for x, y in zip(logits(lm), before, strict=True))
        assert same(logits(lm), before)
