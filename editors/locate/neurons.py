"""Knowledge neurons (Dai et al., ACL 2022, arXiv 2104.08696): which entries of an MLP's key carry the answer.

    Attr(w) = w * integral over a in 0..1 of dP(answer | layer's activations = a * w) / da, eq. 4

by m steps, layer by layer, at the subject's last token and at the last token. Neurons that
several wordings of the fact share are kept, then checked: set to zero and doubled, against as
many random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.locate.result import MOST_SITES, Located, Site
from editors.locate.traced_prompt import Run, TracedPrompt, answer_logprob, embed, run, tokenize_fact
from editors.locate.traced_rows import TracedRows
from editors.model.activations import hooked
from editors.model.lm import LM
from editors.progress import ReportProgress


@dataclass(frozen=True)
class NeuronParams:
    """`steps` of the integral; kept are neurons above `threshold` of a wording's strongest in at least
    `share` of the wordings, at most `most`; `controls` random sets of as many are the comparison."""

    steps: int = 8
    threshold: float = 0.2
    share: float = 0.7
    most: int = 20
    controls: int = 10
    seed: int = 0


Neuron = tuple[str, int, int]  # place ("subject" or "last"), layer, index


@dataclass(frozen=True)
class Checked:
    """Mean probability of the answer over the wordings, with the neurons silenced and doubled."""

    clean: float
    suppressed: float
    amplified: float
    random_suppressed: float
    random_amplified: float

    @property
    def factor(self) -> float:
        """How many times the drop by silencing exceeds that of random neurons (of 1e-4 at least)."""
        return (self.clean - self.suppressed) / max(self.clean - self.random_suppressed, 1e-4)


def places(traced: TracedPrompt) -> dict[str, int]:
    """The tokens looked at, by name; one where the subject ends the prompt."""
    found = {"last": traced.last}
    if traced.last_subject is not None and traced.last_subject != traced.last:
        found = {"subject": traced.last_subject, **found}
    return found


def attributions(
    lm: LM, traced: TracedPrompt, clean: Run, steps: int, report: ReportProgress
) -> dict[str, Tensor]:
    """Integrated gradients per place: (layers, d_in)."""
    found: dict[str, Tensor] = {}
    named = places(traced)
    for k, (name, token) in enumerate(named.items()):
        tail = TracedRows(lm, traced, clean, 0 if lm.is_seq2seq else token)
        rows = []
        for i in range(lm.n_layers):
            report((k + i / lm.n_layers) / len(named), "attributing neurons")
            rows.append(_layer_attribution(lm, tail, clean, i, token, steps))
        found[name] = torch.stack(rows)
    return found


def _layer_attribution(lm: LM, tail: TracedRows, clean: Run, i: int, token: int, steps: int) -> Tensor:
    """Attributions (d_in,) of layer i's neurons at `token`: all steps are rows of one batch."""
    w = clean.neurons[i][0, token].float()  # (d_in,)
    alphas = (torch.arange(steps, device=w.device) + 0.5) / steps  # midpoints
    scaled = (alphas[:, None] * w).requires_grad_()  # (steps, d_in)
    column = token - tail.start

    def put(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shaped = args[0].reshape(steps, -1, w.shape[0]).clone()
        shaped[:, column] = scaled.to(shaped.dtype)
        return (shaped.reshape(args[0].shape), *args[1:])

    hidden = clean.hidden[i][:, tail.start :].expand(steps, -1, -1)
    with torch.enable_grad(), hooked([lm.module(lm.mlp_out(i)).register_forward_pre_hook(put)]):
        hidden = tail.layer(i, hidden)
    with torch.enable_grad():
        for j in range(i + 1, lm.n_layers):
            hidden = tail.layer(j, hidden)
        p = answer_logprob(lm, tail.traced, hidden, tail.start).exp().sum()
        (gradient,) = torch.autograd.grad(p, scaled)
    return (w * gradient.mean(0)).cpu()


def shared_neurons(found: Sequence[dict[str, Tensor]], params: NeuronParams) -> list[tuple[Neuron, float]]:
    """Neurons strong in enough wordings, by their mean attribution, strongest first."""
    counts: dict[Neuron, int] = {}
    sums: dict[Neuron, float] = {}
    for one in found:
        bar = params.threshold * max(float(grid.max()) for grid in one.values())
        for place, grid in one.items():
            for layer, index in (grid > bar).nonzero().tolist() if bar > 0 else ():
                key = (place, layer, index)
                counts[key] = counts.get(key, 0) + 1
                sums[key] = sums.get(key, 0.0) + float(grid[layer, index])
    enough = max(1.0, params.share * len(found))
    kept = [(key, sums[key] / counts[key]) for key in counts if counts[key] >= enough]
    return sorted(kept, key=lambda item: -item[1])[: params.most]


@torch.no_grad()
def check(
    lm: LM, traced_prompts: Sequence[TracedPrompt], neurons: Sequence[Neuron], params: NeuronParams
) -> Checked:
    """Probabilities with the neurons at zero and doubled, and the same for random ones of the same places."""
    generator = torch.Generator().manual_seed(params.seed)
    width = lm.weight(lm.mlp_out(0)).shape[1]
    random = [[_random(lm, n, width, generator) for n in neurons] for _ in range(params.controls)]
    settings = [(list(neurons), 0.0), (list(neurons), 2.0)]
    settings += [(r, factor) for factor in (0.0, 2.0) for r in random]
    total = torch.zeros(1 + len(settings))
    for traced in traced_prompts:
        total += _probabilities(lm, traced, [([], 1.0), *settings])
    p = (total / len(traced_prompts)).tolist()
    n = params.controls
    return Checked(p[0], p[1], p[2], sum(p[3 : 3 + n]) / n, sum(p[3 + n :]) / n)


def _random(lm: LM, like: Neuron, width: int, generator: torch.Generator) -> Neuron:
    layer = int(torch.randint(lm.n_layers, (1,), generator=generator))
    return like[0], layer, int(torch.randint(width, (1,), generator=generator))


def _probabilities(lm: LM, traced: TracedPrompt, settings: Sequence[tuple[list[Neuron], float]]) -> Tensor:
    """Probability of the answer under each setting, a row of one batch each."""
    named = places(traced)
    changes: dict[int, list[tuple[int, int, int, float]]] = {}
    for row, (neurons, factor) in enumerate(settings):
        for place, layer, index in neurons:
            at = (row, named.get(place, traced.last), index, factor)
            changes.setdefault(layer, []).append(at)
    n = len(settings)

    def scale(mine: list[tuple[int, int, int, float]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shaped = args[0].reshape(n, -1, args[0].shape[-1]).clone()
            for row, token, index, factor in mine:
                shaped[row, token, index] *= factor
            return (shaped.reshape(args[0].shape), *args[1:])

        return hook

    handles = [lm.module(lm.mlp_out(i)).register_forward_pre_hook(scale(mine)) for i, mine in changes.items()]
    with hooked(handles):
        return run(lm, traced, embed(lm, traced).expand(n, -1, -1), parts=False).probability.cpu()


def knowledge_neurons(
    lm: LM,
    prompt: str,
    subject: str,
    target: str | None,
    paraphrases: Sequence[str],
    params: NeuronParams,
    report: ReportProgress,
) -> Located:
    """The neurons that the wordings share, with their check. Raises InvalidEdit, or what `report` raises."""
    first = tokenize_fact(lm, prompt, subject, target)
    answer = target or first.answer.strip() or first.answer
    traced_prompts = [first, *(tokenize_fact(lm, p, subject, answer) for p in paraphrases)]
    found = []
    for k, traced in enumerate(traced_prompts):

        def part(fraction: float, message: str, k: int = k) -> None:
            report(0.9 * (k + fraction) / len(traced_prompts), message)

        found.append(attributions(lm, traced, run(lm, traced, embed(lm, traced)), params.steps, part))
    kept = shared_neurons(found, params)
    report(0.9, "checking the neurons")
    checked = check(lm, traced_prompts, [key for key, _ in kept], params) if kept else None
    grid = torch.zeros(len(first.labels), lm.n_layers)
    for place, token in places(first).items():
        grid[token] = torch.stack([f.get(place, f["last"]).clamp(min=0).sum(-1) for f in found]).mean(0)
    best = int(grid.sum(0).argmax())
    named = places(first)
    sites = [
        Site(layer, t := named.get(place, first.last), first.labels[t], "neuron", value, neuron=index)
        for (place, layer, index), value in kept[:MOST_SITES]
    ]
    numbers: dict[str, Any] = {"neurons": len(kept), "wordings": len(traced_prompts), "steps": params.steps}
    if checked is not None:
        numbers |= vars(checked) | {"factor": checked.factor}
    return Located(
        method="knowledge_neurons",
        traced=first,
        maps={"neurons": grid},
        unit="attribution to the answer's probability, positive neurons summed",
        sites=sites,
        best_layer=best,
        confidence=None,
        suggestion=_suggestion(kept, checked, best, len(traced_prompts)),
        numbers=numbers,
    )


def _suggestion(
    kept: Sequence[tuple[Neuron, float]], checked: Checked | None, best: int, wordings: int
) -> str:
    if checked is None:
        return (
            f"No neuron is strong in enough of the {wordings} wordings; the answer does not hang on single neurons "
            "here. Give fewer paraphrases or ones that the model answers, or use causal_trace."
        )
    told = (
        f"Silencing the {len(kept)} neurons takes the answer from {checked.clean:.2f} to {checked.suppressed:.2f} "
        f"(as many random ones: {checked.random_suppressed:.2f}), doubling them to {checked.amplified:.2f}"
    )
    if checked.factor < 2:
        return f"{told}; that is hardly more than chance, so do not build on them. causal_trace looks wider."
    return (
        f"{told}. Most of the attribution lies in layer {best}; preview_edits with params.layer near it, and "
        "suggest_layers measures where editing works best."
    )
