"""Train into a model's weights what a memory beside them answers (distillation).

The teacher is the model with its memories, the student the same model without: it learns the teacher's answers as texts
(sequence-level distillation, Kim and Rush 2016, arXiv 1606.07947) while its own predictions for other facts stay (KL).
The result is a low-rank change (Hu et al. 2022, arXiv 2106.09685), so that whatever takes a LoRA can carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.constants import assumed
from editors.finetune.examples import REHEARSED, UNRELATED, Example
from editors.finetune.key_directions import RANK, RATE, RIGHT_FACTOR, STRIDE, ModuleKeys, key_directions
from editors.finetune.train_params import EARLY, TrainParams
from editors.finetune.training import Training
from editors.model.activations import hooked
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM, Prompt
from editors.patch import WeightPatch, cpu_float

STEPS = assumed(
    24,
    "most steps for one edit",
    "three constrained edits of the default model, taught: 3 of 3 said, 67% of wordings not taught where the memories "
    "say 76%, 67% of the subjects' other facts and 78% of neighbours kept, perplexity 1.04 times; 100 CPU s each",
)


@dataclass(frozen=True)
class Lesson:
    """What one edit is taught from; the first of `said` is its own prompt."""

    said: tuple[tuple[Prompt, tuple[int, int] | None, str], ...]
    """Prompt, the subject's characters in its text from its offset on, and the teacher's answer."""
    kept: tuple[tuple[Prompt, str], ...]
    """Prompt and the student's own answer, whose predictions must stay."""


def distil(
    lm: LM, lessons: Sequence[Lesson], report: Callable[[float], None] = lambda _: None
) -> WeightPatch:
    """The change of one layer's MLP output that teaches the lessons, one after the other. The model is not changed.

    Raises EditError when a training diverges.
    """
    layer = min(lm.n_layers - 1, round(EARLY[0] * lm.n_layers))
    name = lm.mlp_out(layer)
    taught: list[LowRank] = []
    for i, lesson in enumerate(lessons):

        def each(fraction: float, i: int = i) -> None:
            report((i + fraction) / len(lessons))

        earlier = [one.said[0][0] for one in lessons[:i]]
        deltas: Mapping[str, list[Delta]] = {name: list(taught)} if taught else {}
        with lm.patched(deltas):
            taught.append(_taught(lm, layer, lesson, earlier, each))
    left, right = torch.cat([d.left for d in taught], 1), torch.cat([d.right for d in taught], 0)
    return WeightPatch(
        {name: LowRank(left, right)}, info={"ranks": {name: [d.left.shape[1] for d in taught]}}
    )


def _taught(
    lm: LM, layer: int, lesson: Lesson, earlier: Sequence[Prompt], report: Callable[[float], None]
) -> LowRank:
    rows = [_said(lm, *one, own=n == 0) for n, one in enumerate(lesson.said)]
    rows += [_kept(lm, prompt, answer) for prompt, answer in lesson.kept]
    rows += [_kept(lm, prompt, "") for prompt in earlier[-REHEARSED:]]
    rows += [_read(lm, lm.prompt(text, chat=False)) for text in UNRELATED]
    name = lm.mlp_out(layer)
    module = lm.module(name)
    training = Training(lm, rows, {name: module}, layer)
    change = _LowRankChange(training.keys[name], lm.shape(name)[0], lm.place(name))
    groups = [{"params": [change.left], "lr": RATE}, {"params": [change.right], "lr": RATE * RIGHT_FACTOR}]
    with change.on(module, training):
        training.run(torch.optim.Adam(groups), TrainParams(max_steps=STEPS), report)
    return LowRank(cpu_float(change.left), cpu_float(change.right))


class _LowRankChange(nn.Module):
    """A low-rank change of a module's output, which starts at nothing.

    Its right factor starts at the directions that tell the subject's keys from the others'.
    """

    def __init__(self, keys: ModuleKeys, d_out: int, device: torch.device) -> None:
        super().__init__()
        directions = key_directions(keys, RANK).to(device)
        right = torch.zeros(RANK, keys.target.shape[1], device=device)
        right[: len(directions)] = STRIDE * keys.output_rms / RATE * directions
        self.right = nn.Parameter(right)  # (rank, d_in)
        self.left = nn.Parameter(torch.zeros(d_out, RANK, device=device))

    @contextmanager
    def on(self, module: nn.Module, training: Training) -> Iterator[None]:
        """The module with the change added to what it gives, where the training's mask lets it."""

        def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            moved = args[0].float() @ self.right.T @ self.left.T
            return output + training.masked(moved).to(output.dtype)

        with hooked([module.register_forward_hook(add)]):
            yield


def _said(lm: LM, prompt: Prompt, span: tuple[int, int] | None, answer: str, *, own: bool) -> Example:
    """A row to learn."""
    ids = tuple(lm.encode(prompt)[0])
    target = tuple(lm.answer_ids_with_end(prompt, answer))
    token = None if span is None else lm.last_subject_token(prompt, span)
    first = lm.answer_column(ids)
    subject = token if token in lm.prompt_columns(ids)[1:] else None
    return Example(ids, target, tuple(range(first, first + len(target))), own=own, subject=subject)


def _kept(lm: LM, prompt: Prompt, answer: str) -> Example:
    """A row whose predictions stay, at each token of an answer; without one, of the next token."""
    ids = lm.encode(prompt)[0]
    more = lm.answer_ids(prompt, answer) if answer else []
    first = lm.answer_column(ids)
    return Example((*ids, *more[:-1]), (), tuple(range(first, first + max(1, len(more)))))


def _read(lm: LM, prompt: Prompt) -> Example:
    """A text whose predictions stay at each of its tokens."""
    ids = tuple(lm.encode(prompt)[0])
    return Example(ids, (), tuple(lm.prompt_columns(ids)[1:]))
