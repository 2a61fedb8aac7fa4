"""Keys beyond the search: the subject behind other words is moved, the target's own tokens are held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editors import METHODS
from editors.closed_form.contexts import target_contexts
from editors.closed_form.keys import opening_rows, read_keys, subject_rows, target_rows
from editors.closed_form.rome import RomeParams
from editors.edit import Edit
from editors.method import EditContext
from editors.model.lm import LM
from editors.patch import WeightPatch
from tests.editors.conftest import StatisticsOf
from tests.families import DECODERS, make

EDIT = Edit(subject="Croatia", prompt="The currency of {} is the", target="euro")


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
