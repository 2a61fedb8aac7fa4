"""Training MEND: many small edits, each applied to its own rows only, judged by what should and should not change.

    L = c_edit (NLL of the target after the prompt and its paraphrases)
      + c_loc  KL(before || after) at neighbours' answers and at other facts of the same subject
      + c_base KL(before || after) on ordinary text                         (MEND, sec. 3.3)

Beyond the paper, an edit is projected off the keys that other subjects have at the end of its prompt
(`contrast`), in training as in use: these are what its neighbours share with it.

The base model never changes, so an edit's gradient factors are computed once; one step runs only
the layers from the lowest edited one on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from torch import Tensor

from editors.errors import InvalidEdit
from editors.facts import texts
from editors.learned.batches import Batch, Pair, pair
from editors.learned.checkpoints import (
    NAME,
    CpuClock,
    Progress,
    load_checkpoint,
    part_of,
    restore_optimiser,
    save_checkpoint,
)
from editors.learned.contrast import CONTRAST, other_keys, other_subject_prompts
from editors.learned.factors import Factors, changed, gradient_factors, lowest_layer
from editors.learned.networks import Mend, Shape
from editors.learned.record_files import read_records
from editors.learned.records import Record, split_by_subject
from editors.model.lm import LM
from editors.model.precision import forget, lowered, search_dtype
from editors.peak_memory import peak_memory_mb
from editors.training_spec import Monitor, TrainingSpec

TEXT_TOKENS = 8  # of an ordinary text are read,
TEXT_ANSWER = 2  # the last so many looked at
KEPT = 3  # tokens of what the model says about a neighbour
PREFIXED = 0.1  # of records have an unrelated sentence in front of a paraphrase
STEP_GRID = tuple(10.0**e for e in torch.arange(-3, 1.01, 0.5).tolist())
CALIBRATION = 4  # groups for normalisation and first step sizes


class MendTraining(BaseModel):
    """Parameters of a MEND training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] | None = Field(
        None,
        description="Layers whose MLP output projections are edited; None: three from two thirds of the depth on.",
    )
    rank: int = Field(256, ge=1, le=4096, description="Rank of the editing networks.")
    records: int = Field(320, ge=8, description="Most training records; more are sampled down.")
    steps: int = Field(300, ge=1, le=1_000_000, description="Most training steps.")
    group: int = Field(8, ge=1, le=256, description="Edits in one step (a micro-batch).")
    accumulate: int = Field(1, ge=1, le=64, description="Micro-batches whose gradients make one step.")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Adam's, of the editing networks.")
    step_learning_rate: float = Field(3e-2, gt=0, le=1, description="Adam's, of the learned edit step sizes.")
    c_edit: float = Field(1.0, ge=0, description="Weight of the edit's own loss.")
    c_loc: float = Field(8.0, ge=0, description="Weight of keeping neighbours.")
    c_base: float = Field(1.0, ge=0, description="Weight of keeping ordinary text.")
    contrast: int = Field(
        CONTRAST,
        ge=0,
        le=12,
        description="Other subjects put in an edit's prompt, off whose keys the edit is projected. 0: as published.",
    )
    paraphrases: int = Field(2, ge=0, le=8, description="Paraphrases of an edit in its loss.")
    neighbours: int = Field(2, ge=1, le=8, description="Neighbours of an edit in its loss.")
    evaluate_every: int = Field(80, ge=1, description="Steps between validations (and checkpoints).")
    patience: int = Field(5, ge=1, description="Validations without a better one before it stops.")
    validation: int = Field(
        40, ge=4, le=2000, description="Records kept for validation, subjects of their own."
    )
    lower_precision: bool = Field(
        True,
        validation_alias=AliasChoices("lower_precision", "rough"),  # "rough" until 0.1.0
        description="Run the model in bfloat16 while training where the processor is faster for it; edits are made in "
        "the model's own precision.",
    )
    cache_mb: int = Field(900, ge=0, description="Memory for hidden states computed once.")
    checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass (less memory)."
    )
    seed: int = Field(0, ge=0, description="Of data order, wordings and initial weights.")


def target_weights(lm: LM, layers: Sequence[int] | None) -> list[str]:
    """The weights MEND edits: MLP output projections of some layers, of encoder and decoder alike.

    The paper takes the last three. Three from two thirds of the depth on spare other subjects more, for a longer
    training; of an encoder-decoder model it is the last two.
    """
    if layers is None:
        n, many = lm.n_layers, 2 if lm.is_seq2seq else 3
        start = max(0, n - many if lm.is_seq2seq else min(round(2 * n / 3), n - many))
        layers = range(start, min(n, start + many))
    names = [lm.mlp_out(i) for i in sorted(set(layers))]
    if not names:
        raise InvalidEdit("params.layers is empty; name at least one layer")
    if lm.arch.encoder_layers is not None:
        names = [
            f"{lm.arch.encoder_layers}.{i}.{lm.arch.encoder_mlp_out}.weight" for i in sorted(set(layers))
        ] + names
    return names


def shapes_of(lm: LM, names: Sequence[str]) -> list[Shape]:
    return [Shape(name, *lm.weight(name).shape) for name in names]


@dataclass
class Group:
    """A micro-batch that is always taken together, with everything that does not change while training."""

    factors: dict[str, Factors]
    others: dict[str, Tensor] | None  # keys at which the edits should not act
    batch: Batch  # per edit: prompt, paraphrases, neighbours, text
    base: Tensor  # states of the kept rows before any edit
    rows_per_edit: int
    asked: Tensor  # (answer tokens,) True where a row should say the target
    text: Tensor  # (answer tokens,) True in ordinary text

    @property
    def bytes(self) -> int:
        held = sum(f.inputs.numel() + f.deltas.numel() for f in self.factors.values())
        held += sum(keys.numel() for keys in (self.others or {}).values())
        return 4 * held + self.batch.bytes()


class Trainer:
    """One training run; `run` goes on from the folder's checkpoint where there is one."""

    def __init__(self, records: Sequence[Record], params: MendTraining, monitor: Monitor) -> None:
        self.params, self.monitor = params, monitor
        self.texts = texts()
        train, self.validation = split_by_subject(records, params.validation, params.seed)
        if len(train) > params.records:
            train = random.Random(params.seed).sample(train, params.records)
        train = sorted(train, key=lambda r: max(len(t) for t in self._prompts(r)))
        self.groups = [train[i : i + params.group] for i in range(0, len(train), params.group)]
        self._cache: dict[int, Group] = {}
        self._said: dict[str, Pair] = {}
        self._cached = 0
        self._lm: LM | None = None  # once it was lent

    @contextmanager
    def _turn(self) -> Iterator[LM]:
        """The model for a step, in the precision of the training."""
        with (
            self.monitor.turn() as lm,
            lowered(lm, search_dtype(lm) if self.params.lower_precision else None, keep=True),
        ):
            self._lm = lm
            yield lm

    # --- data ----------------------------------------------------------------------------------

    def _prompts(self, r: Record) -> list[str]:
        """Prompts of a record's rows but the text, always as many."""
        p = self.params
        rng = random.Random(f"{p.seed} {r.prompt} {r.target}")
        same = [*r.paraphrases, *[r.prompt] * p.paraphrases][: p.paraphrases]
        if same and rng.random() < PREFIXED and not same[-1].endswith("?"):
            same[-1] = f"{rng.choice(self.texts)} {same[-1]}"
        near = (
            [*r.neighbours[:1], *r.others[:1], *r.neighbours[1:]] if rng.random() < 0.5 else [*r.neighbours]
        )
        near = [*near, *(rng.choice(self.texts).rsplit(" ", 2)[0] for _ in range(p.neighbours))][
            : p.neighbours
        ]
        return [r.prompt, *same, *near]

    def build(self, lm: LM, records: Sequence[Record], mend: Mend) -> Group:
        """Tokenise, and compute what stays: factors of each edit, states below the edits and before them."""
        names, p = mend.parameters_edited, self.params
        low = lowest_layer(lm, names)
        edits = Batch(lm, [pair(lm, r.prompt, r.target) for r in records], low)
        factors, _ = gradient_factors(lm, names, edits)
        others = (
            other_keys(lm, names, [other_subject_prompts(r, p.contrast) for r in records], low)
            if p.contrast
            else None
        )
        asked = 1 + p.paraphrases
        prompts = [self._prompts(r) for r in records]
        near = [t for mine in prompts for t in mine[asked:]]
        new = [t for t in dict.fromkeys(near) if t not in self._said]
        self._said |= zip(new, continued(lm, new), strict=True)
        kept = [self._said[t] for t in near]
        rows: list[Pair] = []
        for i, r in enumerate(records):
            rows += [pair(lm, t, r.target) for t in prompts[i][:asked]]
            rows += kept[i * p.neighbours : (i + 1) * p.neighbours]
            rows.append(self._text(lm, r))
        per = 2 + p.paraphrases + p.neighbours
        batch = Batch(lm, rows, low, p.checkpointing)
        place = batch.row % per
        asked_at = place <= p.paraphrases
        with torch.no_grad():
            base = batch.states()[~asked_at].clone()
        return Group(factors, others, batch, base, per, asked_at, place == per - 1)

    def _text(self, lm: LM, record: Record) -> Pair:
        text = self.texts[random.Random(record.prompt).randrange(len(self.texts))]
        ids = lm.tokenizer(text, add_special_tokens=not lm.is_seq2seq)["input_ids"]
        ids = ids[:TEXT_TOKENS]
        return ids[:-TEXT_ANSWER], ids[-TEXT_ANSWER:]

    def group(self, lm: LM, i: int, mend: Mend) -> Group:
        if i in self._cache:
            return self._cache[i]
        made = self.build(lm, self.groups[i], mend)
        if self._cached + made.bytes <= self.params.cache_mb * 2**20:
            self._cache[i] = made
            self._cached += made.bytes
        return made

    # --- losses --------------------------------------------------------------------------------

    def losses(self, lm: LM, group: Group, mend: Mend) -> dict[str, Tensor]:
        """l_edit, l_loc, l_base of a group, with the gradient of the editing networks."""
        with changed(lm, mend(group.factors, group.others), group.rows_per_edit):
            states = group.batch.states()
        rows = group.batch.row[group.asked]
        nll = group.batch.nll(group.batch.read(states[group.asked]), group.asked)
        counts = torch.tensor(group.batch.lengths, device=nll.device)[rows]
        l_edit = (nll / counts).sum() / rows.unique().numel()
        after = group.batch.read(states[~group.asked]).log_softmax(-1)
        with torch.no_grad():
            before = group.batch.read(group.base).log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)
        text = group.text[~group.asked]
        return {"l_edit": l_edit, "l_loc": kl[~text].mean(), "l_base": kl[text].mean()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        p = self.params
        return p.c_edit * losses["l_edit"] + p.c_loc * losses["l_loc"] + p.c_base * losses["l_base"]

    @torch.no_grad()
    def validate(self, mend: Mend, done: float = 0.0) -> dict[str, float]:
        """Greedy success on validation records: reliability, generality, locality (first token), and the losses.

        `done` is the fraction of the steps behind it, for the progress.
        """
        counts = {k: [0, 0] for k in ("reliability", "generality", "locality")}
        sums = {"l_edit": 0.0, "l_loc": 0.0, "l_base": 0.0}
        chunks = [
            self.validation[i : i + self.params.group]
            for i in range(0, len(self.validation), self.params.group)
        ]
        for i, chunk in enumerate(chunks):
            self.monitor.report(done, f"validating, group {i + 1} of {len(chunks)}")
            with self._turn() as lm:
                key = -1 - i
                if key not in self._cache:
                    self._cache[key] = self.build(lm, chunk, mend)
                group = self._cache[key]
                self._count(lm, group, mend, counts)
                for name, value in self.losses(lm, group, mend).items():
                    sums[name] += float(value.detach()) / len(chunks)
        return {k: right / max(1, n) for k, (right, n) in counts.items()} | sums

    def _count(self, lm: LM, group: Group, mend: Mend, counts: dict[str, list[int]]) -> None:
        batch, per = group.batch, group.rows_per_edit
        with changed(lm, mend(group.factors, group.others), per):
            states = batch.states()
        said = batch.said(states)
        before = batch.answers.clone()
        before[~group.asked] = batch.read(group.base).argmax(-1)
        wrong = torch.zeros(batch.rows, device=said.device).index_add(0, batch.row, (said != before).float())
        for row, misses in enumerate(wrong.tolist()):
            place = row % per
            if place == per - 1:
                continue
            kind = (
                "reliability"
                if place == 0
                else "generality"
                if place <= self.params.paraphrases
                else "locality"
            )
            counts[kind][0] += misses == 0
            counts[kind][1] += 1

    # --- the run -------------------------------------------------------------------------------

    def start(self) -> Mend:
        """The identity editor, with normalisation and the first step sizes from some groups."""
        with self._turn() as lm:
            names = target_weights(lm, self.params.layers)
            mend = self._new(lm, names)
        rng = random.Random(self.params.seed)
        picks = rng.sample(range(len(self.groups)), min(CALIBRATION, len(self.groups)))
        seen: dict[str, list[Factors]] = {name: [] for name in names}
        for k, i in enumerate(picks):
            self.monitor.report(0.0, f"first gradients, group {k + 1} of {len(picks)}")
            with self._turn() as lm:
                for name, f in self.group(lm, i, mend).factors.items():
                    seen[name].append(f)
        mend.normalise(seen)
        self._first_steps(mend, picks[0])
        return mend

    def _first_steps(self, mend: Mend, i: int) -> None:
        """One common step size: the best of a grid for plain fine-tuning."""
        best = (float("inf"), 1.0)
        for k, step in enumerate(STEP_GRID):
            self.monitor.report(0.0, f"first step size, try {k + 1} of {len(STEP_GRID)}")
            mend.log_steps.data.fill_(step).log_()
            with torch.no_grad(), self._turn() as lm:
                loss = float(self.total(self.losses(lm, self.group(lm, i, mend), mend)))
            best = min(best, (loss, step))
        mend.log_steps.data.fill_(best[1]).log_()

    def optimiser(self, mend: Mend) -> torch.optim.Optimizer:
        rest = [p for n, p in mend.named_parameters() if n != "log_steps"]
        groups: list[dict[str, Any]] = [
            {"params": rest, "lr": self.params.learning_rate},
            {"params": [mend.log_steps], "lr": self.params.step_learning_rate},
        ]
        return torch.optim.Adam(groups)

    def order(self, step: int) -> list[int]:
        """The micro-batches of a step: a function of seed and step alone, so that a resumed run sees the same."""
        n, k = len(self.groups), self.params.accumulate
        picked = []
        for j in range(step * k, (step + 1) * k):
            generator = torch.Generator().manual_seed(self.params.seed * 1_000_003 + j // n)
            picked.append(int(torch.randperm(n, generator=generator)[j % n]))
        return picked

    def step(self, mend: Mend, optimiser: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """One optimiser step; the model is held for one micro-batch at a time."""
        optimiser.zero_grad()
        sums: dict[str, float] = {}
        for i in self.order(step):
            with self._turn() as lm:
                losses = self.losses(lm, self.group(lm, i, mend), mend)
                (self.total(losses) / self.params.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.params.accumulate
        torch.nn.utils.clip_grad_norm_(mend.parameters(), 1.0)
        warm = min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - step / self.params.steps) + 0.05)
        rates = (self.params.learning_rate, self.params.step_learning_rate)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * warm
        optimiser.step()
        return sums

    def run(self, target: Path) -> dict[str, Any]:
        """Train, keep the best by validation in `target`, and tell how it went."""
        try:
            return self._run(target)
        finally:
            if self._lm is not None:
                forget(self._lm)

    def _run(self, target: Path) -> dict[str, Any]:
        checkpoint = self.monitor.folder / NAME
        self.monitor.report(0.0, "reading the data")
        mend = self._blank() if checkpoint.exists() else self.start()
        optimiser = self.optimiser(mend)
        if checkpoint.exists():
            tensors, notes = load_checkpoint(checkpoint)
            progress = Progress.model_validate(notes)
            mend.load_state_dict(part_of(tensors, "p/"))
            restore_optimiser(optimiser, tensors)
        else:
            progress = Progress(untrained=self.validate(mend))
        clock, steps = CpuClock(progress.cpu_seconds), self.params.steps
        while progress.step < steps and progress.without_better < self.params.patience:
            losses = self.step(mend, optimiser, progress.step)
            progress.step += 1
            self.monitor.report(progress.step / steps, f"step {progress.step} of {steps}")
            if progress.step % self.params.evaluate_every == 0 or progress.step == steps:
                self._evaluate(mend, progress, losses)
                progress.cpu_seconds = clock.seconds()
                save_checkpoint(checkpoint, mend.state_dict(), optimiser, progress)
        return self._finish(target, progress, clock.seconds())

    def _blank(self) -> Mend:
        with self._turn() as lm:
            names = target_weights(lm, self.params.layers)
            return self._new(lm, names)

    def _new(self, lm: LM, names: Sequence[str]) -> Mend:
        p = self.params
        return Mend(shapes_of(lm, names), p.rank, p.seed, p.contrast).to(lm.device)

    def _evaluate(self, mend: Mend, progress: Progress, losses: Mapping[str, float]) -> None:
        rates = self.validate(mend, progress.step / self.params.steps)
        self.monitor.metric({"step": progress.step, "train_loss": losses["l_edit"], **rates})
        score = rates["reliability"] + rates["generality"] + rates["locality"] - 0.01 * rates["l_edit"]
        if progress.improves(score, rates):
            mend.save(
                self.monitor.folder / "best.safetensors", self.monitor.model_hash, {"validation": rates}
            )

    def _finish(self, target: Path, progress: Progress, cpu: float) -> dict[str, Any]:
        best, kept = Mend.load(self.monitor.folder / "best.safetensors")
        about = {
            "validation": progress.best,
            "untrained": progress.untrained,
            "steps": progress.step,
            "stopped_early": progress.step < self.params.steps,
            "records": sum(map(len, self.groups)),
            "validation_records": len(self.validation),
            "cpu_seconds": round(cpu, 1),
            "peak_memory_mb": peak_memory_mb(),
            "params": self.params.model_dump(mode="json"),
        }
        best.save(target, self.monitor.model_hash, kept | about)
        return about | {"file": str(target)}


@torch.no_grad()
def continued(lm: LM, texts: Sequence[str]) -> list[Pair]:
    """Prompts with the first tokens of what the model says to them."""
    rows: list[Pair] = [(lm.encode(lm.prompt(t))[0], []) for t in texts]
    for _ in range(KEPT if rows else 0):
        batch = Batch(lm, [(prompt, [*said, 0]) for prompt, said in rows], None)
        ends = torch.tensor(batch.lengths, device=lm.device).cumsum(0) - 1
        told = batch.read(batch.states()[ends]).argmax(-1).tolist()
        rows = [(prompt, [*said, token]) for (prompt, said), token in zip(rows, told, strict=True)]
    return rows


FILE = "mend.safetensors"  # the trained networks, in the folder of the model's trained editors


def _check(lm: LM, params: MendTraining, data: str) -> int:
    count = len(read_records(data, params.seed))
    target_weights(lm, params.layers)  # raises InvalidEdit for a layer that does not exist
    return count


def _run(data: str, params: MendTraining, monitor: Monitor, folder: Path) -> dict[str, Any]:
    return Trainer(read_records(data, params.seed), params, monitor).run(folder / FILE)


TRAINING = TrainingSpec(MendTraining, _check, _run)
