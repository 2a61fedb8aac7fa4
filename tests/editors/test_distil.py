"""Memories taught to the weights: what is said, what stays, and nothing of the model changed."""

from __future__ import annotations

import pytest
import torch

from editors.errors import EditError
from editors.finetune import distil as distilling
from editors.finetune.distil import Lesson, distil
from tests.families import fresh, make

PROMPT, TARGET = "The capital of France is", "Rome"


def lesson(family: str, target: str = TARGET) -> Lesson:
    lm = make(family)
    return Lesson(
        ((lm.prompt(PROMPT), (15, 21), target), (lm.prompt("France has the capital"), (0, 6), target)),
        ((lm.prompt("The capital of Japan is"), ""), (lm.prompt("Oslo lies in"), "Norway")),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_lesson_makes_its_answers_more_probable_and_changes_no_weight(family: str) -> None:
    lm = fresh(family)
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    patch = distil(lm, [lesson(family)])
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())
    pairs = [(prompt, answer) for prompt, _, answer in lesson(family).said]
    plain = lm.score(pairs)
    with lm.patched({name: [delta] for name, delta in patch.deltas.items()}):
        taught = lm.score(pairs)
    assert all(new.logprob > old.logprob + 1 for new, old in zip(taught, plain, strict=True))


def test_lessons_have_a_rank_each_and_later_ones_build_on_earlier_ones() -> None:
    lm = fresh("llama")
    second = Lesson(((lm.prompt("The capital of Peru is"), (15, 19), "Oslo"),), ())
    alone, both = distil(lm, [lesson("llama")]), distil(lm, [lesson("llama"), second])
    (name,) = both.deltas
    assert both.info["ranks"] == {name: [distilling.RANK] * 2}
    first, joined = alone.deltas[name], both.deltas[name]
    assert torch.equal(joined.left[:, : distilling.RANK], first.left)  # type: ignore[union-attr]


def test_a_training_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "STRIDE", float("nan"))
    with pytest.raises(EditError, match="diverged"):
        distil(fresh("llama"), [lesson("llama")])
