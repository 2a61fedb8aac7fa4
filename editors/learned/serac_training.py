"""Training SERAC: first the judge of scope on sentence embeddings, then the adapter (Mitchell et al., ICML 2022)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.learned.checkpoints import (
    NAME,
    CpuClock,
    TrainingProgress,
    load_checkpoint,
    part_of,
    restore_optimiser,
    save_checkpoint,
)
from editors.learned.counterfactual import CounterfactualAdapter, adapter_sites
from editors.learned.record_files import read_records
from editors.learned.records import Record, split_by_subject
from editors.learned.scope import Judge, load_encoder
from editors.learned.serac_adapter import AdapterExample, adapter_losses, count_correct, step_examples
from editors.learned.serac_files import TrainedSerac
from editors.learned.serac_judge import THRESHOLD, train_judge
from editors.learned.serac_params import SeracTraining
from editors.model.lm import LM
from editors.peak_memory import peak_memory_mb
from editors.training_spec import Monitor, TrainingSpec

JUDGE_SHARE = 0.2  # of the progress that is reported


class SeracProgress(TrainingProgress):
    """How far a training is, and how accurate the judge is."""

    threshold: float
    scope: dict[str, float]


class SeracTrainer:
    """One training run. `run` continues from the checkpoint in the monitor's folder if there is one."""

    def __init__(self, records: Sequence[Record], params: SeracTraining, monitor: Monitor) -> None:
        self.params, self.monitor = params, monitor
        self.judge_records, self.validation = split_by_subject(records, params.validation, params.seed)
        self.train = self.judge_records
        if len(self.train) > params.records:
            self.train = random.Random(params.seed).sample(self.train, params.records)

    def run(self, folder: Path) -> dict[str, Any]:
        """Train judge and adapter, write them into `folder`, the adapter as it was at its best, and return the report.

        Raises InvalidEdit when `params.layer` does not exist.
        """
        p = self.params
        checkpoint = self.monitor.folder / NAME
        adapter, layer = self._new_adapter()
        optimiser = torch.optim.Adam(adapter.parameters(), lr=p.learning_rate)
        clock = CpuClock(0.0)
        if checkpoint.exists():
            judge, progress, best = self._resume(checkpoint, adapter, optimiser)
            clock = CpuClock(progress.cpu_seconds)
        else:
            judge, scope = train_judge(self.judge_records, self.validation, p, self.monitor)
            progress = SeracProgress(threshold=THRESHOLD, scope=scope, untrained=self._validate(adapter))
            best = {k: v.clone() for k, v in adapter.state_dict().items()}
        while progress.step < p.steps and progress.without_better < p.patience:
            losses = self._step(adapter, optimiser, progress.step, layer)
            progress.step += 1
            done = min(1.0, JUDGE_SHARE + (1 - JUDGE_SHARE) * progress.step / p.steps)
            self.monitor.report(done, f"adapter: step {progress.step} of {p.steps}")
            if progress.step % p.evaluate_every == 0 or progress.step == p.steps:
                if self._evaluate(adapter, progress, losses):
                    best = {k: v.detach().clone() for k, v in adapter.state_dict().items()}
                progress.cpu_seconds = clock.seconds()
                parts = {"adapter": adapter.state_dict(), "best": best, "judge": judge.state_dict()}
                save_checkpoint(checkpoint, _joined(parts), optimiser, progress)
        adapter.load_state_dict(best)
        report = self._report(progress, clock.seconds())
        trained = TrainedSerac(judge.eval(), adapter, p.encoder, progress.threshold, report)
        return report | {"file": str(trained.save(folder, self.monitor.model_hash))}

    def _new_adapter(self) -> tuple[CounterfactualAdapter, int]:
        """The untrained adapter and its first layer."""
        p = self.params
        with self.monitor.turn() as lm:
            layer = lm.n_layers // 2 if p.layer is None else p.layer
            if layer >= lm.n_layers:
                raise InvalidEdit(f"params.layer {layer} does not exist; the last layer is {lm.n_layers - 1}")
            adapter = CounterfactualAdapter(adapter_sites(lm, layer), p.rank, p.seed).to(lm.device)
            return adapter, layer

    def _resume(
        self, checkpoint: Path, adapter: CounterfactualAdapter, optimiser: torch.optim.Optimizer
    ) -> tuple[Judge, SeracProgress, dict[str, Tensor]]:
        """Judge, progress and best adapter of a checkpoint; `adapter` and `optimiser` continue from it."""
        tensors, notes = load_checkpoint(checkpoint)
        restore_optimiser(optimiser, tensors)
        adapter.load_state_dict(part_of(tensors, "p/adapter/"))
        with self.monitor.turn():  # new layers draw random numbers
            judge = Judge(load_encoder(self.params.encoder).width)
        judge.load_state_dict(part_of(tensors, "p/judge/"))
        return judge, SeracProgress.model_validate(notes), part_of(tensors, "p/best/")

    def _step(
        self, adapter: CounterfactualAdapter, optimiser: torch.optim.Optimizer, step: int, layer: int
    ) -> dict[str, float]:
        examples = step_examples(self.train, self.params, step)
        with self.monitor.turn() as lm:
            l_edit, l_loc = adapter_losses(lm, examples, adapter, layer)
            optimiser.zero_grad()
            (l_edit + self.params.c_loc * l_loc).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimiser.step()
        return {"train_loss": float(l_edit.detach()), "l_loc": float(l_loc.detach())}

    def _validate(self, adapter: CounterfactualAdapter) -> dict[str, float]:
        """Reliability and generality of the adapted model on the validation records, and the mean loss."""
        counts = {"reliability": [0, 0], "generality": [0, 0]}
        total = 0.0
        for at in range(0, len(self.validation), self.params.group):
            chunk = self.validation[at : at + self.params.group]
            for name, prompts in (
                ("reliability", [r.prompt for r in chunk]),
                ("generality", [r.paraphrases[0] if r.paraphrases else r.prompt for r in chunk]),
            ):
                pairs = zip(chunk, prompts, strict=True)
                examples = [AdapterExample.of(r, prompt, r.target) for r, prompt in pairs]
                with self.monitor.turn() as lm:
                    right, loss = count_correct(lm, examples, adapter)
                counts[name][0] += right
                counts[name][1] += len(examples)
                total += loss
        rates = {name: right / n for name, (right, n) in counts.items()}
        return rates | {"l_edit": total / sum(n for _, n in counts.values())}

    def _evaluate(
        self, adapter: CounterfactualAdapter, progress: SeracProgress, losses: Mapping[str, float]
    ) -> bool:
        """Validate and add a point to the curves; True when the adapter is the best so far."""
        rates = self._validate(adapter)
        self.monitor.metric({"step": progress.step, **losses, **rates, **progress.scope})
        score = rates["reliability"] + rates["generality"] - 0.01 * rates["l_edit"]
        return progress.improves(score, rates)

    def _report(self, progress: SeracProgress, cpu_seconds: float) -> dict[str, Any]:
        return {
            "scope": progress.scope,
            "validation": progress.best,
            "untrained": progress.untrained,
            "steps": progress.step,
            "stopped_early": progress.step < self.params.steps,
            "records": len(self.train),
            "validation_records": len(self.validation),
            "cpu_seconds": round(cpu_seconds, 1),
            "peak_memory_mb": peak_memory_mb(),
            "params": self.params.model_dump(mode="json"),
        }


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def _check(lm: LM, params: SeracTraining, data: str) -> int:
    count = len(read_records(data, params.seed))
    load_encoder(params.encoder)  # raises NotReady when it is not installed
    return count


def _run(data: str, params: SeracTraining, monitor: Monitor, folder: Path) -> dict[str, Any]:
    return SeracTrainer(read_records(data, params.seed), params, monitor).run(folder)


TRAINING = TrainingSpec(SeracTraining, _check, _run, folder="encoder")
