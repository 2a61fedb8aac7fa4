"""A few steps of Adam on one fact: tell the target, keep everything else, stop as soon as it is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from editors.errors import EditError, InvalidEdit
from editors.finetune.examples import Choice, Example
from editors.finetune.tail import Tail
from editors.method import Params
from editors.model.lm import LM


class TrainParams(Params):
    """What all fine-tuning methods share."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, max_length=200, description="Layers whose MLP output projection is adapted."
    )
    max_steps: int = Field(40, ge=1, le=1000, description="Most optimisation steps; it stops early.")
    lr: float = Field(1e-2, gt=0, le=10, description="Adam's step size.")
    stop_probability: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="Stop once every wording is answered with the target greedily, with this mean probability.",
    )
    openings: int = Field(3, ge=1, le=6, description="Openings the prompt is put behind; the first is none.")
    others: int = Field(
        4, ge=0, le=12, description="Other subjects put in the prompt whose answers are kept as they are."
    )
    keep_weight: float = Field(1.0, ge=0, le=1000, description="Weight of what is kept: KL(before || now).")
    use_probes: bool = Field(
        True,
        description="Also learn from the edit's own paraphrases and neighbours; generality and locality are then "
        "measured on what was trained on. False: they stay a measurement of what was not.",
    )
    seed: int = Field(0, ge=0, le=2**31, description="Of the adapter's initial values.")

    @property
    def choice(self) -> Choice:
        return Choice(self.openings, self.others, self.use_probes)


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
    """Hooks of a method into the loop: more loss, a constraint after each step, a say before stopping."""

    penalty: Callable[[], Tensor] | None = None
    after: Callable[[int], None] = lambda step: None
    may_stop: Callable[[int], bool] = lambda step: True


def train(
    lm: LM,
    rows: Sequence[Example],
    trained: Sequence[Tensor],
    params: TrainParams,
    first_layer: int,
    report: Callable[[float], None],
    step: Step | None = None,
) -> int:
    """Minimise NLL(target) + keep_weight * KL(before || now) over `trained`; returns the steps taken.

    `trained` must start where the model is as it was before. Raises EditError when the loss is not finite.
    """
    step = step or Step()
    report(0.0)
    tail = Tail(lm, first_layer, rows)
    loss = _Loss(rows, lm.device)
    with torch.no_grad():
        loss.base = tail()[~loss.tells]
    optimiser = torch.optim.Adam(trained, lr=params.lr)
    for count in range(params.max_steps + 1):
        report(count / (params.max_steps + 1))
        logp = tail()
        if loss.said(logp, params.stop_probability) and step.may_stop(count):
            return count
        if count == params.max_steps:
            break
        total = loss(logp, params.keep_weight)
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
    """Over the columns of a Tail: which row they belong to, which token they should tell."""

    def __init__(self, rows: Sequence[Example], device: torch.device) -> None:
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
        nll = -(logp[self.tells].gather(1, self.target[:, None])[:, 0] * self.told_weight).sum()
        kl = (self.base.exp() * (self.base - logp[~self.tells])).sum(-1)
        return nll + keep_weight * (kl * self.kept_weight).sum()

    @torch.no_grad()
    def said(self, logp: Tensor, probability: float) -> bool:
        """Every wording is answered greedily, and all together (and the edit's own) with this probability."""
        told = logp[self.tells]
        greedy = bool((told.argmax(-1) == self.target).all())
        p = told.gather(1, self.target[:, None])[:, 0].exp()
        mean = float((p * self.told_weight).sum())
        return greedy and mean >= probability and float(p[self.own].min()) >= probability
