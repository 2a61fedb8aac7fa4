"""Training SERAC: first the judge of scope on sentence embeddings, then the counterfactual adapter.

The judge sees pairs of a prompt and an edit: the edit's own prompt and its paraphrases are in scope;
neighbours, other facts of the same subject and other edits are not. The adapter learns to answer a
prompt with the edit's target when the edit stands before it, and as before when the edit is about
something else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from editors.errors import InvalidEdit
from editors.facts import fill, relations, texts
from editors.learned.batches import Batch, Pair
from editors.learned.checkpoints import (
    NAME,
    CpuClock,
    Progress,
    load_checkpoint,
    part_of,
    restore_optimiser,
    save_checkpoint,
)
from editors.learned.counterfactual import Adapter, adapter_sites
from editors.learned.record_files import read_records
from editors.learned.records import Record, split_by_subject
from editors.learned.scope import DEFAULT, Encoder, Entry, Judge, Pairs, encoder, in_front, masked, pairs_of
from editors.learned.serac_files import Trained
from editors.model.lm import LM
from editors.peak_memory import peak_memory_mb
from editors.training_spec import Monitor, TrainingSpec

ALIKE = 0.55  # cosine of two wordings without subject from which they may mean the same relation


class SeracTraining(BaseModel):
    """Parameters of a SERAC training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field(DEFAULT, description="Sentence encoder: default (MiniLM), a folder, or a hub id.")
    records: int = Field(
        480, ge=8, description="Most training records of the adapter; more are sampled down."
    )
    draws: int = Field(
        3, ge=1, le=20, description="Times the scope judge's pairs are drawn from all records."
    )
    judge_epochs: int = Field(30, ge=1, le=10_000, description="Passes over the pairs for the scope judge.")
    layer: int | None = Field(None, ge=0, description="First layer with an adapter; None: the middle.")
    rank: int = Field(8, ge=1, le=512, description="Rank of the adapter.")
    steps: int = Field(80, ge=1, le=1_000_000, description="Training steps of the adapter at most.")
    group: int = Field(8, ge=1, le=256, description="Prompts in one step.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Adam's, of the adapter.")
    c_loc: float = Field(0.5, ge=0, description="Weight of leaving prompts alone that the edit is not about.")
    distractors: float = Field(
        0.25, ge=0, le=0.9, description="Share of prompts with an edit about something else."
    )
    evaluate_every: int = Field(20, ge=1, description="Steps between validations (and checkpoints).")
    patience: int = Field(3, ge=1, description="Validations without a better one before it stops.")
    validation: int = Field(
        40, ge=4, le=2000, description="Records kept for validation, subjects of their own."
    )
    seed: int = Field(0, ge=0, description="Of data order, wordings and initial weights.")


class SeracProgress(Progress):
    """How far a training is, with what the scope judge reached."""

    threshold: float
    scope: dict[str, float]


def entry_of(record: Record) -> Entry:
    return Entry(record.subject, record.prompt, record.target)


@dataclass(frozen=True)
class Asked:
    """A prompt put to the adapted model with an edit before it."""

    entry: Entry
    prompt: str
    answer: str | None  # None: about something else, to be answered as before


class Trainer:
    """One training run; `run` goes on from the folder's checkpoint where there is one."""

    def __init__(self, records: Sequence[Record], params: SeracTraining, monitor: Monitor) -> None:
        self.params, self.monitor = params, monitor
        train, self.validation = split_by_subject(records, params.validation, params.seed)
        self.all = train
        if len(train) > params.records:
            train = random.Random(params.seed).sample(train, params.records)
        self.train = train

    # --- scope ---------------------------------------------------------------------------------

    def labelled(self, records: Sequence[Record], rng: random.Random) -> list[tuple[str, Entry, float]]:
        """Pairs of a prompt and an edit with 1 (in scope) or 0."""
        shipped = relations()
        loose = texts()
        found = []
        for r in records:
            entry = entry_of(r)
            prefixed = f"{rng.choice(loose)} {rng.choice([r.prompt, *r.paraphrases])}"
            found += [(p, entry, 1.0) for p in (r.prompt, *r.paraphrases, prefixed)]
            away = [*r.neighbours, *r.others, rng.choice(records).prompt, rng.choice(loose)]
            found += [(p, entry, 0.0) for p in away if p not in (r.prompt, *r.paraphrases)]
            for relation in rng.sample(shipped, 3):  # another fact of the same subject
                wording = rng.choice((*relation.statements, *relation.questions))
                found.append((fill(wording, r.subject), entry, -1.0))  # 0, unless it may be the same relation
        return found

    def pairs(self, records: Sequence[Record], rng: random.Random, by: Encoder) -> tuple[Pairs, Tensor]:
        """The pairs embedded, and their labels."""
        labelled = self.labelled(records, rng)
        words = list(dict.fromkeys([q for q, _, _ in labelled] + [e.prompt for _, e, _ in labelled]))
        index = {t: i for i, t in enumerate(words)}
        full = by.embed(words, self._embedded)
        entries = list(dict.fromkeys(e for _, e, _ in labelled))
        place = {e: i for i, e in enumerate(entries)}
        without = by.embed([masked(e.prompt, e.subject) for e in entries], self._embedded)
        rows = torch.tensor([index[q] for q, _, _ in labelled])
        own = torch.tensor([index[e.prompt] for _, e, _ in labelled])
        at = torch.tensor([place[e] for _, e, _ in labelled])
        queries, about = [q for q, _, _ in labelled], [e for _, e, _ in labelled]
        pairs = pairs_of(queries, about, full[rows], full[own], without[at], by, self._embedded)
        labels = torch.tensor([y for _, _, y in labelled])
        sure = (labels >= 0) | ((pairs.masked * pairs.entry_masked).sum(-1) < ALIKE)
        kept = Pairs(*(getattr(pairs, name)[sure] for name in Pairs.__dataclass_fields__))
        return kept, labels[sure].clamp(min=0)

    def _embedded(self, done: int, total: int) -> None:
        self.monitor.report(0.0, f"embedding prompts: {done} of {total}")

    def train_judge(self) -> tuple[Judge, float, dict[str, float]]:
        """The judge, its threshold, and how it does on validation records."""
        rng = random.Random(self.params.seed)
        by = encoder(self.params.encoder)
        pairs, labels = self.pairs(self.all * self.params.draws, rng, by)
        held, truth = self.pairs(self.validation, rng, by)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.params.seed)  # of the CPU alone: no other was forked
            judge = Judge(by.width)
            optimiser = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.05)
            features = pairs.features
            for epoch in range(self.params.judge_epochs):
                self.monitor.report(0.2 * epoch / self.params.judge_epochs, "training the scope judge")
                for part in torch.randperm(len(labels)).split(128):
                    loss = nn.functional.binary_cross_entropy_with_logits(
                        judge.layers(features[part])[:, 0], labels[part]
                    )
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        judge.eval()
        with torch.no_grad():
            sure = judge(held).sigmoid()
        told = (sure >= 0.5).float() == truth
        inside, outside = truth == 1, truth == 0
        rates = {
            "scope_accuracy": float(told.float().mean()),
            "in_scope": float(told[inside].float().mean()),
            "out_of_scope": float(told[outside].float().mean()),
        }
        return judge, 0.5, rates

    # --- counterfactual ------------------------------------------------------------------------

    def asked(self, records: Sequence[Record], step: int) -> list[Asked]:
        """The prompts of a step: a function of seed and step alone."""
        rng = random.Random(f"{self.params.seed} {step}")
        found = []
        for _ in range(self.params.group):
            r = rng.choice(records)
            if rng.random() < self.params.distractors:
                away = [*r.neighbours, *r.others] or [rng.choice(records).prompt]
                found.append(Asked(entry_of(r), rng.choice(away), None))
            else:
                found.append(Asked(entry_of(r), rng.choice([r.prompt, *r.paraphrases]), r.target))
        return found

    def batch(self, lm: LM, asked: Sequence[Asked], first: int | None) -> Batch:
        rows: list[Pair] = []
        for a in asked:
            prompt = in_front(lm.prompt(a.prompt), a.entry)
            rows.append((lm.encode(prompt)[0], [0] if a.answer is None else lm.answer_ids(prompt, a.answer)))
        return Batch(lm, rows, first)

    def losses(
        self, lm: LM, asked: Sequence[Asked], adapter: Adapter, first: int | None
    ) -> tuple[Tensor, Tensor]:
        """NLL of the targets; KL to the model's own answers where the edit is about something else."""
        batch = self.batch(lm, asked, first)
        with adapter.on(lm):
            logits = batch.logits()
        away = torch.tensor([a.answer is None for a in asked], device=logits.device)
        l_edit = l_loc = logits.sum() * 0
        if not away.all():
            l_edit = batch.loss(logits)[~away].mean()
        if away.any():
            plain = [a for a in asked if a.answer is None]
            with torch.no_grad():
                before = Batch(lm, [(lm.encode(lm.prompt(a.prompt))[0], [0]) for a in plain], None).logits()
            after = logits[away[batch.row]].log_softmax(-1)
            base = before.log_softmax(-1)
            l_loc = (base.exp() * (base - after)).sum(-1).mean()
        return l_edit, l_loc

    @torch.no_grad()
    def validate(self, adapter: Adapter, first: int | None) -> dict[str, float]:
        """Greedy success of the adapted model on validation records, the edit before the prompt."""
        counts = {"reliability": [0, 0], "generality": [0, 0]}
        total = 0.0
        for at in range(0, len(self.validation), self.params.group):
            chunk = self.validation[at : at + self.params.group]
            for kind, prompts in (
                ("reliability", [r.prompt for r in chunk]),
                ("generality", [r.paraphrases[0] if r.paraphrases else r.prompt for r in chunk]),
            ):
                asked = [Asked(entry_of(r), p, r.target) for r, p in zip(chunk, prompts, strict=True)]
                with self.monitor.turn() as lm:
                    batch = self.batch(lm, asked, None)
                    with adapter.on(lm):
                        logits = batch.logits()
                wrong = (logits.argmax(-1) != batch.answers).float()
                misses = torch.zeros(batch.rows, device=wrong.device).index_add(0, batch.row, wrong)
                counts[kind][0] += int((misses == 0).sum())
                counts[kind][1] += batch.rows
                total += float(batch.loss(logits).sum())
        rates = {k: right / n for k, (right, n) in counts.items()}
        return rates | {"l_edit": total / sum(n for _, n in counts.values())}

    # --- the run -------------------------------------------------------------------------------

    def run(self, folder: Path) -> dict[str, Any]:
        """Train both, keep the best adapter, and write them into `folder`."""
        p = self.params
        checkpoint = self.monitor.folder / NAME
        with self.monitor.turn() as lm:
            middle = lm.n_layers // 2 if p.layer is None else p.layer
            if middle >= lm.n_layers:
                raise InvalidEdit(
                    f"params.layer {middle} does not exist; the last layer is {lm.n_layers - 1}"
                )
            adapter = Adapter(adapter_sites(lm, middle), p.rank, p.seed).to(lm.device)
            first = None if lm.is_seq2seq else middle
        optimiser = torch.optim.Adam(adapter.parameters(), lr=p.learning_rate)
        clock = CpuClock(0.0)
        if checkpoint.exists():
            tensors, notes = load_checkpoint(checkpoint)
            progress = SeracProgress.model_validate(notes)
            clock = CpuClock(progress.cpu_seconds)
            restore_optimiser(optimiser, tensors)
            adapter.load_state_dict(part_of(tensors, "p/adapter/"))
            judge = Judge(encoder(p.encoder).width)
            judge.load_state_dict(part_of(tensors, "p/judge/"))
            best = part_of(tensors, "p/best/")
        else:
            judge, threshold, scope = self.train_judge()
            untrained = self.validate(adapter, first)
            progress = SeracProgress(threshold=threshold, scope=scope, untrained=untrained)
            best = {k: v.clone() for k, v in adapter.state_dict().items()}
        while progress.step < p.steps and progress.without_better < p.patience:
            losses = self._step(adapter, optimiser, progress.step, first)
            progress.step += 1
            self.monitor.report(
                min(1.0, 0.2 + 0.8 * progress.step / p.steps), f"adapter: step {progress.step} of {p.steps}"
            )
            if progress.step % p.evaluate_every == 0 or progress.step == p.steps:
                best = self._evaluate(adapter, first, progress, losses, best)
                progress.cpu_seconds = clock.seconds()
                tensors = {f"adapter/{k}": v for k, v in adapter.state_dict().items()}
                tensors |= {f"best/{k}": v for k, v in best.items()}
                tensors |= {f"judge/{k}": v for k, v in judge.state_dict().items()}
                save_checkpoint(checkpoint, tensors, optimiser, progress)
        adapter.load_state_dict(best)
        about = self._about(progress, clock.seconds())
        trained = Trained(judge.eval(), adapter, p.encoder, progress.threshold, about)
        return about | {"file": str(trained.save(folder, self.monitor.model_hash))}

    def _step(
        self, adapter: Adapter, optimiser: torch.optim.Optimizer, step: int, first: int | None
    ) -> tuple[float, float]:
        with self.monitor.turn() as lm:
            l_edit, l_loc = self.losses(lm, self.asked(self.train, step), adapter, first)
            optimiser.zero_grad()
            (l_edit + self.params.c_loc * l_loc).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimiser.step()
        return float(l_edit.detach()), float(l_loc.detach())

    def _evaluate(
        self,
        adapter: Adapter,
        first: int | None,
        progress: SeracProgress,
        losses: tuple[float, float],
        best: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        rates = self.validate(adapter, first)
        point = {"step": progress.step, "train_loss": losses[0], "l_loc": losses[1]}
        self.monitor.metric({**point, **rates, **progress.scope})
        score = rates["reliability"] + rates["generality"] - 0.01 * rates["l_edit"]
        if progress.improves(score, rates):
            return {k: v.detach().clone() for k, v in adapter.state_dict().items()}
        return best

    def _about(self, progress: SeracProgress, cpu: float) -> dict[str, Any]:
        return {
            "scope": progress.scope,
            "validation": progress.best,
            "untrained": progress.untrained,
            "steps": progress.step,
            "stopped_early": progress.step < self.params.steps,
            "records": len(self.train),
            "validation_records": len(self.validation),
            "cpu_seconds": round(cpu, 1),
            "peak_memory_mb": peak_memory_mb(),
            "params": self.params.model_dump(mode="json"),
        }


def _check(lm: LM, params: SeracTraining, data: str) -> int:
    count = len(read_records(data, params.seed))
    encoder(params.encoder)  # raises NotReady when it is not installed
    return count


def _run(data: str, params: SeracTraining, monitor: Monitor, folder: Path) -> dict[str, Any]:
    return Trainer(read_records(data, params.seed), params, monitor).run(folder)


TRAINING = TrainingSpec(SeracTraining, _check, _run)
