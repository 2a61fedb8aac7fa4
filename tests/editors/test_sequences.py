"""Edits one after another, and batches that lose a fact, through the host that keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editors.canaries import CANARIES
from editors.closed_form.batch_params import LEAST, MANY, BatchParams
from editors.closed_form.ultraedit import NEUTRAL_TEXTS
from editors.edit import Edit
from editors.errors import EditError, NotReady
from editors.method import EditContext, Prior
from editors.metric import Metric
from editors.model.lm import LM
from editors.moments import compute_moments, condition_of, own_moments
from editors.moments.texts import corpus_text, dataset_text, facts_text, sample_text
from editors.patch import WeightPatch
from editors.table import METHODS
from server.facts.auto_method import FULL, LONG, choose_method
from server.transaction.host import ActivePatch, ModelHost
from tests import device
from tests.editors.conftest import StatisticsOf
from tests.families import fresh, make

SUBJECTS = ("France", "Big Ben", "Danielle Darrieux", "Mount Fuji", "Voltaire", "Gmail")
EDITS = tuple(
    Edit(subject=s, prompt="The name of {} is", target=t) for s, t in zip(SUBJECTS, "abcdef", strict=True)
)


def sequence(
    lm: LM, method: str, statistics_of: StatisticsOf, edits: tuple[Edit, ...] = EDITS, **params: Any
) -> list[ActivePatch]:
    """Each edit computed and applied on top of those before it."""
    host, editor = ModelHost(lm), METHODS[method]
    for i, edit in enumerate(edits):
        prior = [Prior(a.method, a.patch, a.rows) for a in host.stack]
        place = {"layer": 1} if method == "rome" else {"layers": (1,)}
        if method != "ultraedit":
            place |= {"max_steps": 3}
        chosen = editor.params(**place, **params)
        patch = editor.compute(lm, [edit], chosen, EditContext(statistics_of(lm), prior))
        host.set_stack([*host.stack, ActivePatch(i, i, method, patch, (0,), str(i))])
    return list(host.stack)


def disturbance(lm: LM, stack: list[ActivePatch]) -> float:
    """How far later edits move the first one's keys, relative to what it moved them itself."""
    name = lm.mlp_out(1)
    patches = [a.patch for a in stack]
    assert all(isinstance(p, WeightPatch) for p in patches)
    k = patches[0].extra[f"{name}:keys"].double().t()
    own, *later = [p.deltas[name].dense().double() @ k for p in patches]  # type: ignore[attr-defined]
    return float(sum(later).norm() / own.norm())


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit"])
def test_later_edits_leave_the_keys_of_earlier_ones_alone(method: str, statistics_of: StatisticsOf) -> None:
    held = disturbance(lm := fresh("llama"), sequence(lm, method, statistics_of))
    free = disturbance(lm := fresh("llama"), sequence(lm, method, statistics_of, remember=False))
    assert held < 0.7 * free


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit", "ultraedit"])
def test_a_fact_taken_out_of_a_batch_is_not_in_the_weights(method: str, statistics_of: StatisticsOf) -> None:
    """Through the host: the bits of a model that was given the rest of the patch alone.

    They are those of a batch that was computed without the fact, but for rounding, which the search makes greater: it
    is measured by the change that the fact makes.
    """
    lm, other = fresh("gpt2"), fresh("gpt2")
    editor, statistics = METHODS[method], statistics_of(lm)
    quick = {} if method == "ultraedit" else {"max_steps": 3, "rough": False}
    patch = editor.compute(lm, EDITS[:4], editor.params(**quick), EditContext(statistics))
    rest = (0, 1, 3)
    smaller = editor.subset(patch, rest, statistics)
    without = editor.compute(other, [EDITS[i] for i in rest], editor.params(**quick), EditContext(statistics))
    assert isinstance(smaller, WeightPatch)
    assert isinstance(without, WeightPatch)
    for name, delta in without.deltas.items():
        expected, with_it = delta.dense(), patch.deltas[name].dense()  # type: ignore[attr-defined]
        assert (smaller.deltas[name].dense() - expected).norm() < 0.05 * (with_it - expected).norm()
    host, never = ModelHost(lm), ModelHost(other)
    host.set_stack([ActivePatch(1, 1, method, patch, (0, 1, 2, 3), "1")])
    whole = host.weights_hash
    host.set_stack([ActivePatch(1, 1, method, smaller, rest, "2")])
    never.set_stack([ActivePatch(1, 1, method, smaller, rest, "2")])
    assert host.rehash() == never.rehash() != whole
    host.set_stack([ActivePatch(1, 1, method, patch, (0, 1, 2, 3), "1")])
    assert host.rehash() == whole


def test_ultraedit_normalises_by_what_is_active(statistics_of: StatisticsOf) -> None:
    """An earlier edit's features are part of the running statistics until it is reverted."""
    lm, editor = make("llama"), METHODS["ultraedit"]
    params, statistics = editor.params(layers=(1,)), statistics_of(lm)
    first = editor.compute(lm, EDITS[:2], params, EditContext(statistics))
    name = f"{lm.mlp_out(1)}:state"
    counts = []
    for prior in (
        [],
        [Prior("ultraedit", first, (0, 1))],
        [Prior("ultraedit", editor.subset(first, [1], statistics), (1,))],
    ):
        patch = editor.compute(lm, EDITS[2:3], params, EditContext(statistics, prior))
        counts.append(float(patch.extra[name][0, 0]))
    tokens = first.extra["counts"].tolist()
    assert counts[1] - counts[0] == sum(tokens)
    assert counts[2] - counts[0] == tokens[1]


def test_ultraedit_is_not_normalised_on_the_texts_that_drift_is_measured_on() -> None:
    assert not set(NEUTRAL_TEXTS) & set(CANARIES)


def test_ultraedit_needs_no_searched_value_and_makes_the_target_likelier(statistics_of: StatisticsOf) -> None:
    lm, editor = make("llama"), METHODS["ultraedit"]
    edit = Edit(subject="France", prompt="The capital of {} is", target="Berlin")
    prompt, _ = lm.edit_prompt(edit)
    before = lm.score([(prompt, edit.target)])[0].logprob
    patch = editor.compute(lm, [edit], editor.params(lr=1e-4), EditContext(statistics_of(lm)))
    assert isinstance(patch, WeightPatch)
    with lm.patched({n: [d] for n, d in patch.deltas.items()}):
        assert lm.score([(prompt, edit.target)])[0].logprob > before


def test_the_automatic_choice_follows_the_number_of_facts_and_of_active_edits() -> None:
    lm, others = make("llama"), [f"Place {i}" for i in range(FULL)]
    assert choose_method(lm, EDITS[:1], [])[0] == "rome"
    assert choose_method(lm, EDITS[:2], [])[0] == "memit"
    name, why, _ = choose_method(lm, EDITS[:1], others[:LONG])
    assert name == "alphaedit"
    assert str(LONG) in why
    name, why, _ = choose_method(lm, EDITS[:1], others)
    assert name == "wise"
    assert str(FULL) in why
    assert "alphaedit" in why  # for those who need weights
    # two memories of one subject drown each other
    assert choose_method(lm, EDITS[:1], [*others, "FRANCE"])[0] == "alphaedit"
    assert choose_method(lm, EDITS[:2], others)[0] == "memit"
    few, many = (choose_method(lm, EDITS[:1] * n, []) for n in (MANY, MANY + 70))
    assert few.method == many.method == "memit"
    assert not few.params
    assert BatchParams().clamp * LEAST <= many.params["clamp"] < BatchParams().clamp
    assert choose_method(make("t5"), EDITS[:1], [])[0] not in ("rome", "memit", "alphaedit")


# --- second moments ---------------------------------------------------------------------------


def test_all_layers_come_from_one_pass_and_equal_each_layer_alone() -> None:
    lm = make("llama")
    rows = sample_text(lm, 200, lambda *_: None)
    together = compute_moments(lm, range(lm.n_layers), rows, "self", lambda *_: None)
    alone = compute_moments(lm, [1], rows, "self", lambda *_: None)
    torch.testing.assert_close(together[1].matrix, alone[1].matrix)


@pytest.mark.skipif(device.chosen == "cpu", reason="about memory of another device")
def test_what_a_device_has_no_room_for_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    rows = sample_text(lm, 200, lambda *_: None)
    there = compute_moments(lm, [1], rows, "self", lambda *_: None)[1].matrix
    metric = Metric.of(there, 1e-2, lm.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1000))
    here = compute_moments(lm, [1], rows, "self", lambda *_: None)[1].matrix
    torch.testing.assert_close(here, there)
    keys = torch.randn(len(here), 3)
    torch.testing.assert_close(
        Metric.of(here, 1e-2, lm.device).solve(keys), metric.solve(keys), rtol=1e-2, atol=1e-2
    )


def test_without_a_corpus_facts_and_sampled_text_weigh_the_same() -> None:
    lm = make("llama")
    known = facts_text(lm, 200)
    assert 100 < sum(map(len, known)) <= 200
    assert "The capital of" in lm.tokenizer.decode(known[0])
    sampled = sample_text(lm, 300 - sum(map(len, known)), lambda *_: None)
    found = own_moments(lm, [1], 300, lambda *_: None)[1]
    parts = [compute_moments(lm, [1], rows, "self", lambda *_: None)[1] for rows in (known, sampled)]
    torch.testing.assert_close(found.matrix, (parts[0].matrix + parts[1].matrix) / 2)
    assert found.tokens == parts[0].tokens + parts[1].tokens


def test_few_tokens_are_all_sampled() -> None:
    lm = make("llama")
    assert facts_text(lm, 10) == []
    assert own_moments(lm, [1], 10, lambda *_: None)[1].tokens >= 9


def test_conditioning_is_reported(statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    moment = statistics_of(lm).get(1)
    told = condition_of(moment, 1e-2, lm.device)
    values = torch.linalg.eigvalsh(moment.matrix.double())
    assert told.regularised < 1e6
    assert told.condition >= told.regularised
    assert 1 <= told.effective_rank <= len(values)
    assert told.tokens_per_input == pytest.approx(moment.tokens / len(values))


def test_a_corpus_that_is_too_short_or_missing_is_refused(tmp_path: Any) -> None:
    lm = make("llama")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(EditError, match="has only"):
        corpus_text(lm, short, 100)
    with pytest.raises(EditError, match="cannot be read"):
        corpus_text(lm, tmp_path / "none.txt", 100)


def test_a_data_set_without_its_package_says_what_to_install() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(NotReady, match="pip install datasets"):
            dataset_text(make("llama"), "owner/name", 100)
    else:
        with pytest.raises(EditError, match="cannot be read"):
            dataset_text(make("llama"), "no/such-data-set-of-ours", 100)
