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
from editors.finetune.ft import _add
from editors.finetune.training import KEEP_EVERY, Training
from editors.method import EditContext
from editors.model.activations import hooked
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

    def noted(self: ExampleBatch, lm: LM, first: int, rows: Any, *more: Any, **named: Any) -> None:
        if rows[0].answer:
            targets.add(id(self))
        made(self, lm, first, rows, *more, **named)

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
    tokens = sum(part.batch.tokens.numel() for part in (*parts._targets.parts, *parts._preserved.parts))
    assert tokens == sum(len(r.prompt) + len(r.answer_input) for r in rows)


@pytest.mark.parametrize("family", DECODERS)
def test_from_the_subject_on_target_rows_learn_what_whole_rows_do(family: str) -> None:
    lm = make(family)
    name = lm.mlp_out(1)
    rows = [r for r in examples(lm, FACT, ExampleOptions(4, 0, True)) if r.answer]
    found = []
    for narrow in (True, False):
        training = Training(lm, rows, {name: lm.module(name)}, 1)
        assert training._from_subject is not None
        if not narrow:
            training._from_subject = None
        change = torch.zeros(lm.shape(name), device=lm.device, requires_grad=True)
        with torch.no_grad():
            change.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        with hooked([_add(lm.module(name), change, training)]):
            logp = training._run_targets(True)
            training.loss.of_targets(logp).backward()
        found.append((logp.detach(), change.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_while_the_change_acts_at_the_subject_no_token_before_it_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = make("llama")
    widths: list[int] = []
    call = ExampleBatch.__call__

    def noted(self: ExampleBatch) -> torch.Tensor:
        widths.append(self.tokens.shape[1])
        return call(self)

    monkeypatch.setattr(ExampleBatch, "__call__", noted)
    rows = [r for r in examples(lm, FACT, ExampleOptions(4, 0, True)) if r.answer]
    longest = max(len(r.prompt) + len(r.answer_input) for r in rows)
    from_subject = max(len(r.prompt) + len(r.answer_input) - (r.subject or 0) for r in rows)
    learn(
        lm, "ft", layers=(1,), contexts=4, others=0, max_steps=2, lr=1e-6
    )  # the second step is the last at the subject
    assert len(widths) % 3 == 0
    assert max(widths[: 2 * len(widths) // 3]) <= from_subject < max(widths) == longest
