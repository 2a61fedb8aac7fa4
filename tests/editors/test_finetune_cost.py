"""What fine-tuning costs, in counted work, and that running it cheaply changes nothing that it promises."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import METHODS
from editors.edit import Edit
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import ExampleOptions, examples
from editors.finetune.training import KEEP_EVERY, Training
from editors.method import EditContext
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import WeightPatch, join_deltas
from tests.families import DECODERS, make

FACT = Edit(subject="France", prompt="The capital of {} is", target="Rome")


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is faster in bfloat16, whatever this one is."""
    monkeypatch.setattr("editors.finetune.example_batch.search_dtype", lambda lm: torch.bfloat16)


def learn(lm: LM, method: str, **params: Any) -> WeightPatch:
    editor = METHODS[method]
    quick = {"layers": (3,), "lr": 3e-2, "contexts": 1, "others": 1, "keep_weight": 0.0, "max_steps": 200}
    given = editor.params(**quick | params)
    patch = editor.compute(lm, [FACT], given, EditContext(Statistics(Path("nowhere"), "none")))
    assert isinstance(patch, WeightPatch)
    return patch


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("family", DECODERS)
def test_a_rough_batch_predicts_about_the_same_and_exactly_the_same_where_that_is_asked(family: str) -> None:
    lm = make(family)
    rows = examples(lm, FACT, ExampleOptions(2, 2, True))
    whole, rough = ExampleBatch(lm, 1, rows), ExampleBatch(lm, 1, rows, rough_above=1)
    assert (whole.is_rough, rough.is_rough) == (False, True)
    with torch.no_grad():
        assert torch.equal(rough.exact(), whole())
        assert (rough() - whole()).abs().max() < 0.2
        assert not torch.equal(rough(), whole())


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("method", ["ft", "lora"])
def test_what_is_learned_roughly_is_answered_by_the_model_in_its_own_precision(method: str) -> None:
    lm = make("llama")
    patch = learn(lm, method, stop_probability=0.6)
    assert all(p.dtype == torch.float32 for p in lm.model.parameters())
    with lm.patched(join_deltas([patch])):
        score = lm.score([(lm.prompt(FACT.text), FACT.target)])[0]
    assert (score.rank, score.logprob / score.tokens > math.log(0.5)) == (0, True)


@pytest.mark.usefixtures("bfloat16")
def test_training_goes_on_until_the_target_is_learned_in_the_models_own_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    run = Training.run

    def counted(self: Training, *given: Any, **named: Any) -> int:
        steps.append(run(self, *given, **named))
        return steps[-1]

    monkeypatch.setattr(Training, "run", counted)
    learn(make("llama"), "ft", stop_probability=0.5)
    monkeypatch.setattr(Training, "_is_learned_exactly", lambda self, params: False)
    learn(make("llama"), "ft", stop_probability=0.5)
    assert steps[0] < steps[1] == 200


def test_preserved_rows_are_run_as_often_as_said_and_only_where_they_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work: Counter[bool] = Counter()  # tokens with padding that were run, by whether targets are among them
    targets: set[int] = set()
    call, made = ExampleBatch.__call__, ExampleBatch.__init__

    def noted(self: ExampleBatch, lm: LM, first: int, rows: Any, *more: Any) -> None:
        if rows[0].answer:
            targets.add(id(self))
        made(self, lm, first, rows, *more)

    def counted(self: ExampleBatch) -> torch.Tensor:
        if torch.is_grad_enabled():
            work[id(self) in targets] += self.tokens.numel()
        return call(self)

    monkeypatch.setattr(ExampleBatch, "__init__", noted)
    monkeypatch.setattr(ExampleBatch, "__call__", counted)
    steps = 6
    slow = {"max_steps": steps, "stop_probability": 0.999999, "contexts": 4, "others": 4, "lr": 1e-6}
    learn(make("llama"), "ft", keep_weight=1.0, **slow)
    with_preserved = Counter(work)
    work.clear()
    learn(
        make("llama"), "ft", max_steps=steps, stop_probability=0.999999, contexts=4, others=4, keep_weight=0
    )
    assert work[False] == 0
    assert with_preserved[True] == work[True]
    lm = make("llama")
    rows = examples(lm, FACT, ExampleOptions(4, 4, True))
    once = len([r for r in rows if not r.answer]) * max(len(r.prompt) for r in rows if not r.answer)
    assert 0 < with_preserved[False] <= once * (steps // KEEP_EVERY)


def test_rows_of_unlike_length_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    monkeypatch.setattr("editors.model.text.pass_cost", lambda device: 0)
    rows = examples(lm, FACT, ExampleOptions(4, 4, True))
    parts = Training(lm, rows, {}, 1)
    tokens = sum(part.batch.tokens.numel() for part in (*parts._targets, *parts._preserved))
    assert tokens == sum(len(r.prompt) + len(r.answer_input) for r in rows)
