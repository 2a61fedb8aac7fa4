"""A few steps of Adam on one fact: tell the target, keep everything else, stop as soon as it is said.

What is trained acts, while the target is learned, at the subject's last token alone in the
sentences that tell it, and everywhere in those that are kept. So it learns to know the subject
rather than the sentence, which is what lets a change carry over to other wordings; at the end it
must hold acting everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.errors import EditError, InvalidEdit
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import Example, ExampleOptions
from editors.method import Params
from editors.model.activations import record
from editors.model.lm import END, LM

# A subject's key in another wording answers to a change only in part (on the default model with 0.6 on average, in
# one case of five with a third), so the change must do with less: shares of it by row, the edit's own prompt first.
SHARES = (1.0, 0.5, 0.35)
LATE = 0.6  # of the depth; from here on little moves from the subject to the end of the prompt


class TrainParams(Params):
    """What all fine-tuning methods share."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, max_length=200, description="Layers whose MLP output projection is adapted."
    )
    max_steps: int = Field(40, ge=1, le=1000, description="Most optimisation steps; it stops early.")
    lr: float = Field(1e-2, gt=0, le=10, description="Adam's step size.")
    stop_probability: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="Stop once every wording is answered with the target greedily, with this mean probability.",
    )
    contexts: int = Field(4, ge=1, le=6, description="Forms the prompt is put in; the first is itself.")
    others: int = Field(
        4, ge=0, le=12, description="Other subjects put in the prompt whose answers are kept as they are."
    )
    keep_weight: float = Field(1.0, ge=0, le=1000, description="Weight of what is kept: KL(before || now).")
    use_probes: bool = Field(
        True,
        description="Also learn from the edit's own paraphrases and neighbours. Those are then left out of generality "
        "and locality. False: train without them and measure with them.",
    )
    seed: int = Field(0, ge=0, le=2**31, description="Of the adapter's initial values.")

    @property
    def example_options(self) -> ExampleOptions:
        return ExampleOptions(self.contexts, self.others, self.use_probes)


def chosen_layers(lm: LM, params: TrainParams, depths: Sequence[float]) -> tuple[int, ...]:
    """The layers asked for, in order, or those at these depths. Raises InvalidEdit for one that is not."""
    if params.layers is None:
        return tuple(sorted({min(lm.n_layers - 1, round(d * lm.n_layers)) for d in depths}))
    for layer in params.layers:
        if not 0 <= layer < lm.n_layers:
            raise InvalidEdit(f"params.layers has {layer}; this model has layers 0 to {lm.n_layers - 1}")
    return tuple(sorted(set(params.layers)))


@dataclass(frozen=True)
class Step:
    """A method's say in the loop: more loss, a constraint after each step, a word before stopping."""

    penalty: Callable[[], Tensor] | None = None
    after: Callable[[int], None] = lambda step: None
    may_stop: Callable[[int], bool] = lambda step: True


@dataclass(frozen=True)
class Seen:
    """What one module saw before anything was trained."""

    told: Tensor  # (m, d_in) inputs where the target is learned
    kept: Tensor  # (p, d_in) inputs at all other tokens
    output: float  # root mean square of the outputs' coordinates at the former


class Training:
    """One fact's examples, run once on the model as it is, and then trained on."""

    def __init__(self, lm: LM, rows: Sequence[Example], modules: Mapping[str, nn.Module], first: int) -> None:
        self.tail = ExampleBatch(lm, first, rows)
        self.loss = _Loss(lm, rows)
        self.gate: Tensor | None = None  # (all tokens, 1): where the trained part acts; None: everywhere
        self._here, shares = self._places(rows, first < LATE * lm.n_layers)
        gated = bool((shares > 0).any())
        self._acts = torch.where(shares > 0, self._here * shares, 1.0).reshape(-1, 1) if gated else None
        with torch.no_grad(), record(modules, inputs=True) as inputs, record(modules) as outputs:
            self.loss.base = self.tail()[~self.loss.tells]
        self.seen = {n: self._see(inputs[n], outputs[n]) for n in modules}

    def _places(self, rows: Sequence[Example], early: bool) -> tuple[Tensor, Tensor]:
        """Where the target is learned: (rows, tokens), and with which share of the change, (rows, 1).

        The subject's last token; where that is not known, or the layers lie too late for it to be heard at
        the end of the prompt, the tokens that are answered. The share is 0 in rows where the change acts
        everywhere and in full.
        """
        here = torch.zeros_like(self.tail.tokens)
        shares = torch.zeros(len(rows), 1, device=here.device)
        for i, row in enumerate(rows):
            if row.answer and row.subject is not None and early:
                here[i, row.subject], shares[i] = True, 1.0 if row.own else SHARES[i % len(SHARES)]
            elif row.answer:
                here[i, list(row.columns)] = True
        return here, shares

    def _see(self, inputs: Tensor, outputs: Tensor) -> Seen:
        home = self._here.device
        x = inputs.reshape(-1, inputs.shape[-1]).to(home).float()
        y = outputs.reshape(-1, outputs.shape[-1]).to(home).float()
        here = self._here.reshape(-1)
        there = self.tail.tokens.reshape(-1) & ~here
        return Seen(x[here], x[there], float(y[here].square().mean().sqrt()))

    def gated(self, change: Tensor) -> Tensor:
        """A module's change of its output, where it acts at present."""
        if self.gate is None:
            return change
        gate: Tensor = self.gate.reshape(*change.shape[:-1], 1)
        return change * gate.to(change.device, change.dtype)

    def run(
        self,
        optimiser: torch.optim.Optimizer,
        params: TrainParams,
        report: Callable[[float], None],
        step: Step | None = None,
    ) -> int:
        """Minimise NLL(target) + keep_weight * KL(before || now); returns the steps taken.

        What the optimiser moves must start where the model is as it was. Raises EditError when the loss is not
        finite.
        """
        step = step or Step()
        gate = self._acts
        for count in range(params.max_steps + 1):
            report(count / (params.max_steps + 1))
            if 2 * count > params.max_steps:
                gate = None  # the subject alone does not do it
            self.gate = gate
            logp = self.tail()
            if self.loss.said(logp, params.stop_probability) and step.may_stop(count):
                self.gate = None  # as it will act
                logp = logp if gate is None else self.tail()
                if self.loss.said(logp, params.stop_probability):
                    return count
            if count == params.max_steps:
                break
            total = self.loss(logp, params.keep_weight)
            if step.penalty is not None:
                total = total + step.penalty()
            if not torch.isfinite(total):
                raise EditError("training diverged (the loss is not finite); try a smaller params.lr")
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
            with torch.no_grad():
                step.after(count)
        return params.max_steps


class _Loss:
    """Over the columns of an ExampleBatch: which row they belong to, which token they should tell."""

    def __init__(self, lm: LM, rows: Sequence[Example]) -> None:
        device = lm.device
        self.answer_logprobs = lm.answer_logprobs

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)

        told = [r for r in rows if r.answer]
        kept = [r for r in rows if not r.answer]
        self.tells = column([float(bool(r.answer)) for r in rows for _ in r.columns]).bool()
        self.target = torch.tensor([t for r in told for t in r.answer], device=device)
        self.own = column([float(r.own) for r in told for _ in r.answer]).bool()
        # Every row weighs the same, however many tokens it has.
        self.told_weight = column([1 / len(r.answer) / len(told) for r in told for _ in r.answer])
        self.kept_weight = column([1 / len(r.columns) / len(kept) for r in kept for _ in r.columns])
        self.base: Tensor | None = None  # (kept columns, vocabulary)

    def __call__(self, logp: Tensor, keep_weight: float) -> Tensor:
        assert self.base is not None
        nll = -(self._told(logp) * self.told_weight).sum()
        kl = (self.base.exp() * (self.base - logp[~self.tells])).sum(-1)
        return nll + keep_weight * (kl * self.kept_weight).sum()

    def _told(self, logp: Tensor) -> Tensor:
        """Log-probability of each of the answers' ids; of END, that no token follows that goes on with the word."""
        return self.answer_logprobs(logp[self.tells], self.target)

    @torch.no_grad()
    def said(self, logp: Tensor, probability: float) -> bool:
        """Every wording is answered greedily, and all together (and the edit's own) with this probability."""
        p = self._told(logp).exp()
        tokens = self.target != END
        greedy = bool((logp[self.tells][tokens].argmax(-1) == self.target[tokens]).all())
        mean = float((p * self.told_weight).sum())
        return bool(greedy and mean >= probability and float(p[self.own].min()) >= probability)


class BlockAdam(torch.optim.Optimizer):
    """Adam with one second moment for a whole weight (Adam-mini, arXiv 2406.16793).

    Steps are sums of gradients then, so that the change stays what gradients are: of low rank, along the
    inputs that were learned at. Adam's own, one for each entry, scatters it over all inputs.
    """

    def __init__(
        self, weights: Sequence[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the mean gradient, in units of the gradients' root mean square."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(count=0, mean=torch.zeros_like(weight), square=0.0)
                state["count"] += 1
                one, two = group["betas"]
                state["mean"].lerp_(weight.grad, 1 - one)
                state["square"] += (1 - two) * (float(weight.grad.square().mean()) - state["square"])
                square = state["square"] / (1 - two ** state["count"])
                scale = 1 / (1 - one ** state["count"]) / (square**0.5 + 1e-12)
                weight.sub_(state["mean"], alpha=group["lr"] * scale)


def key_directions(seen: Seen, rank: int, ridge: float = 0.05) -> Tensor:
    """Directions (at most rank, d_in) that tell the keys to learn at from all others.

    Each key is projected off the span of the others (with a ridge) and scaled so that it answers itself with
    1: ROME's right-hand side, with these tokens for the second moment. Where there are more keys than the rank
    allows, their right singular vectors stand for them, scaled so that the mean key gives 1 to the first.
    """
    told, kept = seen.told.double().cpu(), seen.kept.double().cpu()
    gram = kept @ kept.t()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left = told - torch.linalg.solve(gram, kept @ told.t()).t() @ kept
    response = (left * told).sum(1, keepdim=True)  # positive, as the ridge keeps the projection contracting
    each: Tensor = left / response.clamp(min=1e-9)
    if len(each) <= rank:
        return each.float()
    _, s, vt = torch.linalg.svd(each, full_matrices=False)
    found: Tensor = vt[:rank] * (s[:rank, None] / s[0])
    mean = float(vt[0] @ told.mean(0))
    return (found / mean if abs(mean) > 1e-9 else found).float()
