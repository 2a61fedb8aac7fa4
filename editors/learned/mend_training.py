"""Training MEND: the loop over groups of edits, with validation and checkpoints (Mitchell et al., ICLR 2022).

Beyond the paper, an edit is projected off the keys of other subjects in the same prompt (see `contrast`), in training
as in use: its neighbours share these keys with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from editors.constants import assumed
from editors.learned.checkpoints import (
    NAME,
    CpuClock,
    TrainingProgress,
    load_checkpoint,
    part_of,
    restore_optimiser,
    save_checkpoint,
)
from editors.learned.factors import Factors
from editors.learned.mend_groups import EditGroup, GroupBuilder
from editors.learned.mend_losses import RATES, count_successes, group_losses, total_loss
from editors.learned.mend_params import MendTraining, published_values, shapes_of, target_weights
from editors.learned.networks import Mend
from editors.learned.record_files import read_records
from editors.learned.records import Record, split_by_subject
from editors.model.lm import LM
from editors.model.precision import forget, lowered, search_dtype
from editors.peak_memory import peak_memory_mb
from editors.training_spec import Monitor, TrainingSpec

FILE = "mend.safetensors"  # the trained networks, in the folder of the model's trained editors
BEST = "best.safetensors"  # the best networks so far, in the job's folder
STEP_GRID = assumed(
    tuple(10.0**e for e in torch.arange(-3, 1.01, 0.5).tolist()),
    "first step sizes of MEND that are tried; the one with the lowest loss is used",
    "wide enough for models of any scale",
)
CALIBRATION = assumed(
    4, "groups that MEND's normalisation is computed from", "each has many tokens, and they cost little"
)
WARM_UP = assumed(20, "steps over which MEND's learning rate rises", "a usual length")
CLIP = assumed(1.0, "norm to which the gradients of MEND's networks are clipped", "a usual value")


class MendTrainer:
    """One training run. `run` continues from the checkpoint in the monitor's folder if there is one."""

    def __init__(self, records: Sequence[Record], params: MendTraining, monitor: Monitor) -> None:
        self.params, self.monitor = params, monitor
        self._builder = GroupBuilder(params)
        train, self.validation = split_by_subject(records, params.validation, params.seed)
        if len(train) > params.records:
            train = random.Random(params.seed).sample(train, params.records)
        # records of similar length together: less padding
        train = sorted(train, key=lambda r: max(len(t) for t in self._builder.prompts(r)))
        self.groups = _chunks(train, params.group)
        self._lm: LM | None = None  # the model, once we have had a turn

    def run(self, target: Path) -> dict[str, Any]:
        """Train, write the best networks by validation to `target`, and return what to report."""
        try:
            return self._run(target)
        finally:
            if self._lm is not None:
                forget(self._lm)

    def _run(self, target: Path) -> dict[str, Any]:
        checkpoint = self.monitor.folder / NAME
        self.monitor.report(0.0, "reading the data")
        mend = self._new() if checkpoint.exists() else self._calibrated()
        optimiser = self._optimiser(mend)
        if checkpoint.exists():
            tensors, notes = load_checkpoint(checkpoint)
            progress = TrainingProgress.model_validate(notes)
            mend.load_state_dict(part_of(tensors, "p/"))
            restore_optimiser(optimiser, tensors)
        else:
            progress = TrainingProgress(untrained=self._validate(mend))
        clock, steps = CpuClock(progress.cpu_seconds), self.params.steps
        while progress.step < steps and progress.without_better < self.params.patience:
            losses = self._step(mend, optimiser, progress.step)
            progress.step += 1
            self.monitor.report(progress.step / steps, f"step {progress.step} of {steps}")
            if progress.step % self.params.evaluate_every == 0 or progress.step == steps:
                self._evaluate(mend, progress, losses)
                progress.cpu_seconds = clock.seconds()
                save_checkpoint(checkpoint, mend.state_dict(), optimiser, progress)
        return self._finish(target, progress, clock.seconds())

    @contextmanager
    def _turn(self) -> Iterator[LM]:
        """The model for a step, in the precision of the training."""
        with self.monitor.turn() as lm:
            dtype = search_dtype(lm) if self.params.lower_precision else None
            with lowered(lm, dtype, keep=True):
                self._lm = lm
                yield lm

    def _group(self, lm: LM, i: int, mend: Mend) -> EditGroup:
        return self._builder.training(lm, i, self.groups[i], mend)

    # --- before the first step -----------------------------------------------------------------

    def _new(self) -> Mend:
        p = self.params
        with self._turn() as lm:
            shapes = shapes_of(lm, target_weights(lm, p.layers))
            return Mend(shapes, p.rank, p.seed, p.contrast).to(lm.device)

    def _calibrated(self) -> Mend:
        """The identity editor, with its normalisation and first step sizes computed from some groups."""
        mend = self._new()
        rng = random.Random(self.params.seed)
        picks = rng.sample(range(len(self.groups)), min(CALIBRATION, len(self.groups)))
        seen: dict[str, list[Factors]] = {name: [] for name in mend.parameters_edited}
        for k, i in enumerate(picks):
            self.monitor.report(0.0, f"first gradients, group {k + 1} of {len(picks)}")
            with self._turn() as lm:
                for name, factors in self._group(lm, i, mend).factors.items():
                    seen[name].append(factors)
        mend.normalise(seen)
        self._set_first_steps(mend, picks[0])
        return mend

    def _set_first_steps(self, mend: Mend, i: int) -> None:
        """Set all step sizes to the one of STEP_GRID with the lowest loss on group i."""
        best = (float("inf"), 1.0)
        for k, step in enumerate(STEP_GRID):
            self.monitor.report(0.0, f"first step size, try {k + 1} of {len(STEP_GRID)}")
            mend.log_steps.data.fill_(step).log_()
            with torch.no_grad(), self._turn() as lm:
                losses = group_losses(lm, self._group(lm, i, mend), mend)
                best = min(best, (float(total_loss(losses, self.params)), step))
        mend.log_steps.data.fill_(best[1]).log_()

    def _optimiser(self, mend: Mend) -> torch.optim.Optimizer:
        networks = [p for n, p in mend.named_parameters() if n != "log_steps"]
        groups: list[dict[str, Any]] = [
            {"params": networks, "lr": self.params.learning_rate},
            {"params": [mend.log_steps], "lr": self.params.step_learning_rate},
        ]
        return torch.optim.Adam(groups)

    # --- a step --------------------------------------------------------------------------------

    def _order(self, step: int) -> list[int]:
        """The micro-batches of a step. They depend on seed and step alone, so a resumed run takes the same."""
        n, k = len(self.groups), self.params.accumulate
        picked = []
        for j in range(step * k, (step + 1) * k):
            generator = torch.Generator().manual_seed(self.params.seed * 1_000_003 + j // n)
            picked.append(int(torch.randperm(n, generator=generator)[j % n]))
        return picked

    def _step(self, mend: Mend, optimiser: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """One optimiser step; returns the mean losses. The model is held for one micro-batch at a time."""
        p = self.params
        optimiser.zero_grad()
        means: dict[str, float] = {}
        for i in self._order(step):
            with self._turn() as lm:
                losses = group_losses(lm, self._group(lm, i, mend), mend)
                (total_loss(losses, p) / p.accumulate).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) / p.accumulate
        torch.nn.utils.clip_grad_norm_(mend.parameters(), CLIP)
        # rises over the first steps, falls over the second half
        schedule = min(1.0, (step + 1) / WARM_UP) * min(1.0, 2 * (1 - step / p.steps) + 0.05)
        rates = (p.learning_rate, p.step_learning_rate)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * schedule
        optimiser.step()
        return means

    # --- validation ----------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, mend: Mend, done: float = 0.0) -> dict[str, float]:
        """Reliability, generality, locality (first token) and mean losses on the validation records.

        Args:
            done: fraction of the steps taken so far, for the progress report.
        """
        counts = {name: [0, 0] for name in RATES}
        means = {"l_edit": 0.0, "l_loc": 0.0, "l_base": 0.0}
        chunks = _chunks(self.validation, self.params.group)
        for i, chunk in enumerate(chunks):
            self.monitor.report(done, f"validating, group {i + 1} of {len(chunks)}")
            with self._turn() as lm:
                group = self._builder.validation(lm, i, chunk, mend)
                for name, (right, n) in count_successes(lm, group, mend, self.params.paraphrases).items():
                    counts[name][0] += right
                    counts[name][1] += n
                for name, value in group_losses(lm, group, mend).items():
                    means[name] += float(value.detach()) / len(chunks)
        return {name: right / max(1, n) for name, (right, n) in counts.items()} | means

    def _evaluate(self, mend: Mend, progress: TrainingProgress, losses: Mapping[str, float]) -> None:
        """Validate, add a point to the curves, and save the networks if they are the best so far."""
        rates = self._validate(mend, progress.step / self.params.steps)
        self.monitor.metric({"step": progress.step, "train_loss": losses["l_edit"], **rates})
        score = sum(rates[name] for name in RATES) - 0.01 * rates["l_edit"]
        if progress.improves(score, rates):
            mend.save(self.monitor.folder / BEST, self.monitor.model_hash, {"validation": rates})

    def _finish(self, target: Path, progress: TrainingProgress, cpu_seconds: float) -> dict[str, Any]:
        best, notes = Mend.load(self.monitor.folder / BEST)
        report = {
            "validation": progress.best,
            "untrained": progress.untrained,
            "steps": progress.step,
            "stopped_early": progress.step < self.params.steps,
            "records": sum(map(len, self.groups)),
            "validation_records": len(self.validation),
            "cpu_seconds": round(cpu_seconds, 1),
            "peak_memory_mb": peak_memory_mb(),
            "params": self.params.model_dump(mode="json"),
        }
        best.save(target, self.monitor.model_hash, notes | report)
        return report | {"file": str(target)}


def _chunks(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    return [records[i : i + size] for i in range(0, len(records), size)]


def _check(lm: LM, params: MendTraining, data: str) -> int:
    count = len(read_records(data, params.seed))
    target_weights(lm, params.layers)  # raises InvalidEdit for a layer that does not exist
    return count


def _run(data: str, params: MendTraining, monitor: Monitor, folder: Path) -> dict[str, Any]:
    return MendTrainer(read_records(data, params.seed), params, monitor).run(folder / FILE)


TRAINING = TrainingSpec(MendTraining, _check, _run, published_values)
