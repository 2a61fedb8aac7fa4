"""Keys beyond the search: the subject behind other words is moved, the target's own tokens are held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editors import METHODS
from editors.closed_form.buckets import Buckets
from editors.closed_form.contexts import TargetRow, target_contexts
from editors.closed_form.keys import held_rows, opening_rows, read_keys, subject_rows, target_rows
from editors.closed_form.material_rows import contexts_of
from editors.closed_form.rome import RomeParams
from editors.closed_form.varied_rows import VariedRow
from editors.edit import Edit
from editors.forms.form import Form, Hold, Material
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import WeightPatch, join_deltas, trained_prompts
from tests.editors.conftest import StatisticsOf
from tests.families import DECODERS, make

EDIT = Edit(subject="Croatia", prompt="The currency of {} is the", target="euro")
OTHER = Edit(subject="Marie Curie", prompt="{} is a native speaker of", target="Swedish")


def delta(lm: LM, method: str, statistics_of: StatisticsOf, **more: Any) -> torch.Tensor:
    place: dict[str, Any] = {"layer": 1} if method == "rome" else {"layers": (1,)}
    params = METHODS[method].params(**place, max_steps=3, **more)
    patch = METHODS[method].compute(lm, [EDIT], params, EditContext(statistics_of(lm)))
    assert isinstance(patch, WeightPatch)
    (found,) = patch.deltas.values()
    return found.dense()


@pytest.mark.parametrize("family", DECODERS)
def test_a_row_ends_with_the_subject_behind_each_opening(family: str) -> None:
    lm, params = make(family), RomeParams(contexts=4)
    rows = subject_rows(lm, EDIT, params)
    contexts = list(dict.fromkeys(c.row.ids[: c.row.position + 1] for c in target_contexts(lm, EDIT, 4)))
    assert len(contexts) == 3  # words after the prompt leave the subject's key as it is
    assert rows[:3] == contexts
    assert len(rows) == 3 + params.wordings
    assert all(lm.tokenizer.decode(row).rstrip().endswith("Croatia") for row in rows)


@pytest.mark.parametrize("family", DECODERS)
def test_keys_read_together_are_those_read_alone(family: str) -> None:
    """Padding on the left changes nothing."""
    lm = make(family)
    rows = subject_rows(lm, EDIT, RomeParams())
    together = read_keys(lm, [0, 1], rows)
    for layer in (0, 1):
        alone = torch.cat([read_keys(lm, [layer], [row])[layer] for row in rows])
        torch.testing.assert_close(together[layer], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["rome", "emmet"])  # memit and alphaedit weigh keys, and promise none
def test_the_subject_behind_other_words_moves_along(method: str, statistics_of: StatisticsOf) -> None:
    """What the delta does to those keys comes nearer to what it does to the prompt's own key."""
    lm = make("llama")
    rows = subject_rows(lm, EDIT, RomeParams())
    own, behind = read_keys(lm, [1], [rows[0], rows[-1]])[1]
    off = []
    for wordings in (0, 4):
        d = delta(lm, method, statistics_of, wordings=wordings)
        off.append(float((d @ (behind - own)).norm() / (d @ own).norm()))
    assert off[1] < off[0]


@pytest.mark.parametrize("family", DECODERS)
def test_every_token_of_the_target_ends_a_row(family: str) -> None:
    lm = make(family)
    rows = target_rows(lm, EDIT)
    prompt, _ = lm.edit_prompt(EDIT)
    ids, target = lm.encode(prompt)[0], lm.answer_ids(prompt, EDIT.target)
    assert [list(row) for row in rows] == [[*ids, *target[: i + 1]] for i in range(len(target))]


@pytest.mark.parametrize("method", ["emmet", "memit", "alphaedit"])
def test_the_targets_tokens_move_less_when_they_are_held(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    keys = read_keys(lm, [1], target_rows(lm, EDIT))[1]
    moved = [
        float((delta(lm, method, statistics_of, hold_targets=held) @ keys.t()).norm())
        for held in (False, True)
    ]
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize("method", ["rome", "r_rome", "memit", "emmet", "pmet", "alphaedit"])
def test_the_token_that_opens_every_prompt_is_left_as_it_is(method: str, statistics_of: StatisticsOf) -> None:
    """Its key dwarfs all others and is in no second moment, so that without a hold an edit moves it most."""
    lm = make("gemma3")
    (opening,) = opening_rows(lm)
    assert lm.encode(lm.prompt("Anything", chat=False))[0][0] == opening[0]
    assert lm.encode(lm.prompt("Anything?", chat=True))[0][0] == opening[0]
    change = delta(lm, method, statistics_of)
    own = subject_rows(lm, EDIT, RomeParams())[0]
    moved = [float((change @ read_keys(lm, [1], [row])[1][0]).norm()) for row in (opening, own)]
    assert moved[0] < 1e-3 * moved[1]


def test_nothing_is_held_where_prompts_open_with_an_ordinary_token() -> None:
    assert opening_rows(make("qwen2")) == []


MATERIAL = Material(
    learned=(
        Form("reworded", "Croatia's currency is the", (0, 7)),
        Form("chat", "What is the currency of Croatia?", (24, 31)),
        Form("statement", EDIT.text, EDIT.span, question="What is the currency of Croatia?"),
        Form("reworded", "The country's money is the", None),
    ),
    measured=(Form("reworded", "In Croatia, people pay with the", (3, 10)),),
    held=(
        Hold("The capital of Croatia is", "Zagreb", (15, 22), "relation", said="Zagreb"),
        Hold("Croatia lies in", "Europe", (0, 7), "relation", said="Europe"),
        Hold("What is the capital of Croatia?", "Zagreb", (23, 30), "relation", said="The capital is Zagreb"),
    ),
    siblings=(Hold("The language of Croatia is", "Croatian", (16, 23), "relation", said="Croatian"),),
)


def test_learned_forms_have_the_target_and_held_facts_what_the_model_said() -> None:
    lm = make("llama")
    rows, owner = contexts_of(lm, [EDIT, EDIT], 2, materials=[MATERIAL, Material()])
    assert owner.count(0) == 1 + 3 + 1 + 3 + 3  # the form that does not name the subject has no key
    assert owner.count(1) == 2 + 1
    for row in rows:
        last = row.row.position + row.columns[-1]
        if row.target:
            assert row.row.ids[last + 1 :] == row.target[-1:]
        else:
            assert last == len(row.row.ids) - (2 if row.said else 1)
    assert sorted(row.said > 0 for row in rows if row.fact) == [False] * 3 + [True] * 3
    (inside_an_answer,) = [row.row for row in rows if row.row.also]
    texts = [lm.tokenizer.decode(row.row.ids) for row in rows]
    assert len(inside_an_answer.also) == 1  # named in the question and again in the answer
    assert not any("people pay" in text or "language of" in text for text in texts)
    assert sum("The capital is Zagreb" in text for text in texts) == 1


def test_keys_of_held_facts_that_are_not_the_edits_own_are_held() -> None:
    lm = make("llama")
    rows = held_rows(lm, EDIT, RomeParams(), MATERIAL)
    texts = [lm.tokenizer.decode(row) for row in rows]
    assert any(text.endswith("The capital of Croatia") for text in texts)
    assert any(text.endswith("What is the capital of Croatia") for text in texts)
    assert not any(text.removeprefix("<s>").strip() == "Croatia" for text in texts)
    moved = subject_rows(lm, EDIT, RomeParams(), MATERIAL)
    assert not set(rows) & set(moved)
    assert len(moved) > len(subject_rows(lm, EDIT, RomeParams()))
    assert held_rows(lm, EDIT, RomeParams(), Material()) == []


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit"])
def test_held_facts_change_less_and_are_recorded_as_trained_on(
    method: str, statistics_of: StatisticsOf
) -> None:
    lm = make("qwen2")  # puts no token before a text, so that nothing stands before the subject here
    editor = METHODS[method]
    place: dict[str, Any] = {"layer": 1} if method == "rome" else {"layers": (1,)}
    params = editor.params(
        **place, forms=True, max_steps=20, lr=0.3, clamp=100, stop_probability=0.9999, rough=False
    )
    kept = replace(MATERIAL, held=(Hold("Croatia lies in", "Europe", (0, 7), "relation"),))
    ids = torch.tensor([lm.encode(kept.held[0].in_model(lm))[0]])

    def moved(weight: float) -> float:
        held = params.model_copy(update={"hold_weight": weight})
        patch = editor.compute(lm, [EDIT], held, EditContext(statistics_of(lm), materials=[kept]))
        with torch.no_grad():
            before = lm.model(ids).logits[0, -1].log_softmax(-1)
            with lm.patched(join_deltas([patch])):
                after = lm.model(ids).logits[0, -1].log_softmax(-1)
        return float((before.exp() * (before - after)).sum())

    assert moved(1e4) < 0.5 * moved(0.0)
    both = EditContext(statistics_of(lm), materials=[MATERIAL, Material()])
    patch = editor.compute(lm, [EDIT, OTHER], params, both)
    texts = {form.prompt for form in MATERIAL.learned} | {hold.prompt for hold in MATERIAL.held}
    assert trained_prompts(patch) == texts - {EDIT.text}
    assert trained_prompts(editor.subset(patch, [1], statistics_of(lm))) == frozenset()


def test_a_token_changes_as_much_as_a_weight_would_change_it() -> None:
    """With `answer_by`, the search sees what the finished update does, on every token from the varied one on."""
    lm = make("llama")
    rows, _ = contexts_of(lm, [EDIT], 2, materials=[MATERIAL])
    rows = [*rows, TargetRow(VariedRow(rows[0].row.ids, 0), rows[0].target)]
    torch.manual_seed(0)
    width, out = lm.weight(lm.mlp_out(1)).shape[1], lm.weight(lm.mlp_out(1)).shape[0]
    x, delta = torch.randn(width) / width, torch.randn(out)
    above = Buckets(lm, 1, [row.row for row in rows])
    above.answer_by(x.expand(len(rows), -1))
    found = above(delta.expand(len(rows), -1))
    picks = torch.arange(len(rows)), torch.tensor([len(r.row.ids) - r.row.position - 1 for r in rows])
    logits = above.head(above.states(found, *picks))
    with lm.patched({lm.mlp_out(1): [LowRank(delta[:, None], x[None])]}), torch.no_grad():
        opened = [
            i for i, row in enumerate(rows) if row.row.position == 0
        ]  # nothing stands before the subject
        assert opened
        for i in opened:
            expected = lm.model(torch.tensor([rows[i].row.ids])).logits[0, -1]
            assert torch.allclose(logits[i], expected, atol=2e-4)
