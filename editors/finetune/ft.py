"""Fine-tuning of one MLP projection, with and without a bound on the change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.edit import Edit
from editors.finetune.examples import examples, trained_texts
from editors.finetune.training import (
    BlockAdam,
    Seen,
    Step,
    Training,
    TrainParams,
    chosen_layers,
    key_directions,
)
from editors.method import EditContext, Editor
from editors.model.activations import hooked
from editors.model.deltas import Delta, Dense
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float, with_training, with_training_of

DEPTH = (0.15,)


class FtParams(TrainParams):
    """Parameters of fine-tuning."""

    variant: Literal["ft-m", "ft-l"] = Field(
        "ft-m",
        description="ft-m: the target's tokens alone are learned. ft-l: the same, and no weight may move further "
        "than `bound`.",
    )
    lr: float = Field(
        3e-3, gt=0, le=10, description="Step size: how far an entry of the weight moves in the mean."
    )
    project: bool = Field(
        True,
        description="Leave out of every step what lies along the inputs of what is kept. False: plain fine-tuning.",
    )
    bound: float = Field(5e-3, gt=0, le=10, description="ft-l: greatest change of any single weight.")


class Ft(Editor[FtParams]):
    name = "ft"
    family = "finetune"
    title = "Fine-tuning of one layer (FT-M, FT-L)"
    description = (
        "Trains the MLP output projection of one layer on the fact for a few steps, while the predictions for other "
        "subjects in the same sentence and on unrelated text are kept, and stops as soon as the target is said."
    )
    source = "FT-L: Zhu et al. 2020, arXiv 2012.00363; FT-M: Zhang et al. 2024, arXiv 2401.01286"
    when = "A baseline for comparison, and for encoder-decoder models; rome is cheaper and lora smaller."
    cost = "Some twenty passes over a dozen short sentences per fact; the patch is as large as the weight."
    batch = False
    params = FtParams

    def resolve(self, lm: LM, params: FtParams) -> FtParams:
        return params.model_copy(update={"layers": chosen_layers(lm, params, DEPTH)})

    def trained_on(self, edits: Sequence[Edit], params: FtParams) -> list[list[str]]:
        return trained_texts(edits, params.example_options)

    def compute(self, lm: LM, edits: Sequence[Edit], params: FtParams, context: EditContext) -> Patch:
        """One dense change per edit and layer, each learned on top of those before it."""
        params = self.resolve(lm, params)
        assert params.layers is not None
        names = [lm.mlp_out(i) for i in params.layers]
        rows: list[dict[str, Tensor]] = []
        for i, edit in enumerate(edits):
            before: dict[str, list[Delta]] = {n: [Dense(r[n]) for r in rows] for n in names if rows}

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            with lm.patched(before):
                rows.append(self._learn(lm, names, edit, edits[:i], params, report))
        return with_training(_patch(rows), self.trained_on(edits, params))

    def _learn(
        self, lm: LM, names: Sequence[str], edit: Edit, learned: Sequence[Edit], params: FtParams, report: Any
    ) -> dict[str, Tensor]:
        assert params.layers is not None
        deltas = {
            n: torch.zeros(lm.weight(n).shape, device=lm.weight(n).device, requires_grad=True) for n in names
        }

        def bound(_: int) -> None:
            for delta in deltas.values():
                delta.clamp_(-params.bound, params.bound)

        step = Step(after=bound) if params.variant == "ft-l" else Step()
        rows = examples(lm, edit, params.example_options, learned)
        training = Training(lm, rows, {n: lm.module(n) for n in names}, params.layers[0])
        if params.project:
            for name, delta in deltas.items():
                delta.register_hook(_projection(training.seen[name], delta.device))
        with hooked([_add(lm.module(n), d, training) for n, d in deltas.items()]):
            optimiser = BlockAdam(list(deltas.values()), params.lr)
            training.run(optimiser, params, report, step)
        return {n: cpu_float(d) for n, d in deltas.items()}

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """Each edit's change was kept: the others are left out of the sum."""
        assert isinstance(patch, WeightPatch)
        if not patch.extra:
            return patch
        some = _patch([{n: patch.extra[f"{i:05d}:{n}"] for n in patch.deltas} for i in rows])
        return with_training_of(some, patch, rows)


def _projection(seen: Seen, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Keep of a gradient what lies along the keys learned at, less what they share with those that are kept.

    As gradient projection memory does (Saha et al., ICLR 2021, arXiv 2103.09762).
    """
    rows = key_directions(seen, len(seen.told)).double()
    basis = torch.linalg.qr(rows.t())[0].float().to(device)  # (d_in, keys)
    return lambda gradient: (gradient @ basis) @ basis.t()


def _add(module: nn.Module, delta: Tensor, training: Training) -> Any:
    """Let a module compute with weight + delta, in float32, without touching the weight."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        more: Tensor = training.gated(args[0].float() @ delta.t())
        return output + more.to(output.dtype)

    return module.register_forward_hook(hook)


def _patch(rows: Sequence[dict[str, Tensor]]) -> WeightPatch:
    """The sum, and each edit's own part where there are several."""
    deltas: dict[str, Delta] = {}
    for name in rows[0]:
        total = rows[0][name].clone()
        for row in rows[1:]:
            total += row[name]
        deltas[name] = Dense(total)
    extra = {f"{i:05d}:{n}": t for i, row in enumerate(rows) for n, t in row.items()} if len(rows) > 1 else {}
    return WeightPatch(deltas, extra=extra)
