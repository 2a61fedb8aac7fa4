"""The examples and losses that SERAC's adapter is trained on.

A prompt is given with an edit before it. If the edit is about the prompt, the adapted model should answer with the
edit's target; otherwise as the model answers without the edit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.learned.batches import Pair, TokenBatch
from editors.learned.counterfactual import CounterfactualAdapter
from editors.learned.records import Record
from editors.learned.scope import Entry, edit_before
from editors.learned.serac_params import SeracTraining
from editors.model.lm import LM


@dataclass(frozen=True)
class AdapterExample:
    """A prompt that is given to the adapted model with an edit before it."""

    entry: Entry
    prompt: str
    answer: str | None  # None: the edit is about something else, the answer should stay

    @classmethod
    def of(cls, record: Record, prompt: str, answer: str | None) -> AdapterExample:
        return cls(Entry(record.subject, record.prompt, record.target), prompt, answer)


def step_examples(records: Sequence[Record], params: SeracTraining, step: int) -> list[AdapterExample]:
    """The examples of a step. They depend on seed and step alone, so a resumed run takes the same."""
    rng = random.Random(f"{params.seed} {step}")
    examples = []
    for _ in range(params.group):
        r = rng.choice(records)
        if rng.random() < params.distractors:
            away = [*r.neighbours, *r.others] or [rng.choice(records).prompt]
            examples.append(AdapterExample.of(r, rng.choice(away), None))
        else:
            examples.append(AdapterExample.of(r, rng.choice([r.prompt, *r.paraphrases]), r.target))
    return examples


def example_batch(lm: LM, examples: Sequence[AdapterExample], layer: int | None) -> TokenBatch:
    """The examples as a batch; `layer` is the first layer with an adapter (see `Batch`)."""
    rows: list[Pair] = []
    for example in examples:
        prompt = edit_before(lm.prompt(example.prompt), example.entry)
        answer = [0] if example.answer is None else lm.answer_ids(prompt, example.answer)
        rows.append((lm.encode(prompt)[0], answer))
    return TokenBatch(lm, rows, layer)


def adapter_losses(
    lm: LM, examples: Sequence[AdapterExample], adapter: CounterfactualAdapter, layer: int | None
) -> tuple[Tensor, Tensor]:
    """NLL of the targets, and KL to the model's own answers where the edit is about something else."""
    batch = example_batch(lm, examples, layer)
    with adapter.on(lm):
        logits = batch.logits()
    away = torch.tensor([e.answer is None for e in examples], device=logits.device)
    l_edit = l_loc = logits.sum() * 0
    if not away.all():
        l_edit = batch.loss(logits)[~away].mean()
    if away.any():
        prompts = [lm.prompt(e.prompt) for e in examples if e.answer is None]
        with torch.no_grad():
            before = TokenBatch(lm, [(lm.encode(p)[0], [0]) for p in prompts], None).logits().log_softmax(-1)
        after = logits[away[batch.row]].log_softmax(-1)
        l_loc = (before.exp() * (before - after)).sum(-1).mean()
    return l_edit, l_loc


@torch.no_grad()
def count_correct(
    lm: LM, examples: Sequence[AdapterExample], adapter: CounterfactualAdapter
) -> tuple[int, float]:
    """How many examples are answered with their target, and the sum of their losses."""
    batch = example_batch(lm, examples, None)
    with adapter.on(lm):
        logits = batch.logits()
    wrong = (logits.argmax(-1) != batch.answers).float()
    misses = torch.zeros(batch.rows, device=wrong.device).index_add(0, batch.row, wrong)
    return int((misses == 0).sum()), float(batch.loss(logits).sum())
