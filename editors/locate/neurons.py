"""Knowledge neurons (Dai et al., ACL 2022, arXiv 2104.08696): the MLP neurons that the answer depends on.

    Attr(w) = w * integral over a in 0..1 of dP(answer | layer's activations = a * w) / da, eq. 4

The integral takes m steps, layer by layer, at the subject's last token and at the last token. Neurons
that several prompts for the fact share are then checked: they are set to zero and doubled, and
compared with equally many random neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.constants import limit, published
from editors.locate.result import MOST_SITES, Located, Site
from editors.locate.traced_prompt import TracedPrompt, TracedRun, answer_logprob, embed, run, tokenize_fact
from editors.locate.traced_rows import TracedRows
from editors.model.activations import hooked
from editors.model.lm import LM
from editors.progress import ReportProgress

CLEAR_FACTOR = limit(
    2.0,
    "how many times the effect of random neurons the selected ones must have",
    "decides a sentence of advice alone; the figures stay the same",
)


@dataclass(frozen=True)
class NeuronParams:
    """How neurons are attributed, selected and checked."""

    steps: int = limit(
        8,
        "steps of the integral",
        "time: Dai et al. 2022 take 20; with fewer the attribution is coarser, and no edit reads it",
    )
    threshold: float = published(
        0.2,
        "attribution above which a neuron counts, as a share of the prompt's strongest",
        "Dai et al. 2022, section 4.1",
    )
    share: float = published(
        0.7,
        "share of the prompts in which a neuron must count",
        "Dai et al. 2022, section 4.1",
    )
    most: int = limit(
        20,
        "neurons selected, at most",
        "the size of the answer: of more, the strongest are shown",
    )
    controls: int = limit(
        10,
        "random sets of neurons that the selected ones are compared with",
        "time: one batch; fewer make the comparison coarser",
    )
    seed: int = 0


Neuron = tuple[str, int, int]  # place ("subject" or "last"), layer, index


@dataclass(frozen=True)
class NeuronCheck:
    """Mean probability of the answer over the prompts, with the neurons set to zero and doubled."""

    clean: float
    suppressed: float
    amplified: float
    random_suppressed: float
    random_amplified: float

    @property
    def factor(self) -> float:
        """The drop from setting the neurons to zero over that from random ones (taken as at least 1e-4)."""
        return (self.clean - self.suppressed) / max(self.clean - self.random_suppressed, 1e-4)


def places(traced: TracedPrompt) -> dict[str, int]:
    """The tokens whose neurons are attributed, by name; only one where the subject ends the prompt."""
    tokens = {"last": traced.last}
    if traced.last_subject is not None and traced.last_subject != traced.last:
        tokens = {"subject": traced.last_subject, **tokens}
    return tokens


def attributions(
    lm: LM, traced: TracedPrompt, clean: TracedRun, steps: int, report: ReportProgress
) -> dict[str, Tensor]:
    """Integrated gradients of all neurons: one grid (layers, d_in) per place."""
    grids: dict[str, Tensor] = {}
    tokens = places(traced)
    for k, (name, token) in enumerate(tokens.items()):
        upper = TracedRows(lm, traced, clean, traced.upper_start(token))
        rows = []
        for i in range(lm.n_layers):
            report((k + i / lm.n_layers) / len(tokens), "attributing neurons")
            rows.append(_layer_attribution(lm, upper, clean, i, token, steps))
        grids[name] = torch.stack(rows)
    return grids


def _layer_attribution(lm: LM, upper: TracedRows, clean: TracedRun, i: int, token: int, steps: int) -> Tensor:
    """Attributions (d_in,) of layer i's neurons at `token`. All steps are rows of one batch."""
    w = clean.neurons[i][0, token].float()  # (d_in,)
    alphas = (torch.arange(steps, device=w.device) + 0.5) / steps  # midpoints
    scaled = (alphas[:, None] * w).requires_grad_()  # (steps, d_in)
    column = token - upper.start

    def put(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shaped = args[0].reshape(steps, -1, w.shape[0]).clone()
        shaped[:, column] = scaled.to(shaped.dtype)
        return (shaped.reshape(args[0].shape), *args[1:])

    hidden = clean.hidden[i][:, upper.start :].expand(steps, -1, -1)
    with torch.enable_grad(), hooked([lm.module(lm.mlp_out(i)).register_forward_pre_hook(put)]):
        hidden = upper.layer(i, hidden)
    with torch.enable_grad():
        for j in range(i + 1, lm.n_layers):
            hidden = upper.layer(j, hidden)
        p = answer_logprob(lm, upper.traced, hidden, upper.start).exp().sum()
        (gradient,) = torch.autograd.grad(p, scaled)
    return (w * gradient.mean(0)).cpu()


def shared_neurons(
    attributed: Sequence[dict[str, Tensor]], params: NeuronParams
) -> list[tuple[Neuron, float]]:
    """Neurons that are strong in enough prompts, with their mean attribution, strongest first.

    Args:
        attributed: the result of `attributions` for each prompt.
    """
    counts: dict[Neuron, int] = {}
    sums: dict[Neuron, float] = {}
    for grids in attributed:
        minimum = params.threshold * max(float(grid.max()) for grid in grids.values())
        for place, grid in grids.items():
            for layer, index in (grid > minimum).nonzero().tolist() if minimum > 0 else ():
                key = (place, layer, index)
                counts[key] = counts.get(key, 0) + 1
                sums[key] = sums.get(key, 0.0) + float(grid[layer, index])
    enough = max(1.0, params.share * len(attributed))
    shared = [(key, sums[key] / counts[key]) for key in counts if counts[key] >= enough]
    return sorted(shared, key=lambda item: -item[1])[: params.most]


@torch.no_grad()
def check(
    lm: LM, traced_prompts: Sequence[TracedPrompt], neurons: Sequence[Neuron], params: NeuronParams
) -> NeuronCheck:
    """Measure the answer with the neurons set to zero and doubled, and with random neurons at the same tokens."""
    generator = torch.Generator().manual_seed(params.seed)
    random = [[_random_neuron(lm, n, generator) for n in neurons] for _ in range(params.controls)]
    settings = [(list(neurons), 0.0), (list(neurons), 2.0)]
    settings += [(r, factor) for factor in (0.0, 2.0) for r in random]
    total = torch.zeros(1 + len(settings))
    for traced in traced_prompts:
        total += _probabilities(lm, traced, [([], 1.0), *settings])
    p = (total / len(traced_prompts)).tolist()
    n = params.controls
    return NeuronCheck(p[0], p[1], p[2], sum(p[3 : 3 + n]) / n, sum(p[3 + n :]) / n)


def _random_neuron(lm: LM, neuron: Neuron, generator: torch.Generator) -> Neuron:
    """A random neuron of any layer, at the token of `neuron`."""
    layer = int(torch.randint(lm.n_layers, (1,), generator=generator))
    width = lm.shape(lm.mlp_out(layer))[1]
    return neuron[0], layer, int(torch.randint(width, (1,), generator=generator))


def _probabilities(lm: LM, traced: TracedPrompt, settings: Sequence[tuple[list[Neuron], float]]) -> Tensor:
    """Probability of the answer (settings,); a setting multiplies its neurons by its factor."""
    tokens = places(traced)
    changes: dict[int, list[tuple[int, int, int, float]]] = {}
    for row, (neurons, factor) in enumerate(settings):
        for place, layer, index in neurons:
            change = (row, tokens.get(place, traced.last), index, factor)
            changes.setdefault(layer, []).append(change)
    n = len(settings)

    def scale(layer_changes: list[tuple[int, int, int, float]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shaped = args[0].reshape(n, -1, args[0].shape[-1]).clone()
            for row, token, index, factor in layer_changes:
                shaped[row, token, index] *= factor
            return (shaped.reshape(args[0].shape), *args[1:])

        return hook

    handles = [
        lm.module(lm.mlp_out(i)).register_forward_pre_hook(scale(layer_changes))
        for i, layer_changes in changes.items()
    ]
    with hooked(handles):
        return run(lm, traced, embed(lm, traced).expand(n, -1, -1), parts=False).probability.cpu()


def _attributed(
    lm: LM, traced_prompts: Sequence[TracedPrompt], steps: int, report: ReportProgress
) -> list[dict[str, Tensor]]:
    """The result of `attributions` for each prompt."""
    found = []
    for k, traced in enumerate(traced_prompts):

        def report_part(fraction: float, message: str, k: int = k) -> None:
            report(0.9 * (k + fraction) / len(traced_prompts), message)

        clean = run(lm, traced, embed(lm, traced))
        found.append(attributions(lm, traced, clean, steps, report_part))
    return found


def knowledge_neurons(
    lm: LM,
    prompt: str,
    subject: str,
    target: str | None,
    paraphrases: Sequence[str],
    params: NeuronParams,
    report: ReportProgress,
) -> Located:
    """Find the neurons that a prompt and its paraphrases share, and check them.

    Args:
        prompt: a prompt that contains the subject, or {} in its place.
        target: the answer; None: the model's own next token after `prompt`.
        paraphrases: other prompts that contain the subject and have the same answer.

    Raises:
        InvalidEdit: for a prompt that cannot be traced; and what `report` raises.
    """
    first = tokenize_fact(lm, prompt, subject, target)
    answer = target or first.answer.strip() or first.answer
    traced_prompts = [first, *(tokenize_fact(lm, p, subject, answer) for p in paraphrases)]
    attributed = _attributed(lm, traced_prompts, params.steps, report)
    neurons = shared_neurons(attributed, params)
    report(0.9, "checking the neurons")
    checked = check(lm, traced_prompts, [key for key, _ in neurons], params) if neurons else None
    grid = _neuron_map(first, attributed, lm.n_layers)
    best = int(grid.sum(0).argmax())
    numbers: dict[str, Any] = {
        "neurons": len(neurons),
        "wordings": len(traced_prompts),
        "steps": params.steps,
    }
    if checked is not None:
        numbers |= vars(checked) | {"factor": checked.factor}
    return Located(
        method="knowledge_neurons",
        traced=first,
        maps={"neurons": grid},
        unit="attribution to the answer's probability, positive neurons summed",
        sites=_sites(first, neurons[:MOST_SITES]),
        best_layer=best,
        confidence=None,
        suggestion=_suggestion(neurons, checked, best, len(traced_prompts)),
        numbers=numbers,
    )


def _neuron_map(first: TracedPrompt, attributed: Sequence[dict[str, Tensor]], layers: int) -> Tensor:
    """Sums of the positive attributions, averaged over the prompts: (tokens of the first prompt, layers)."""
    grid = torch.zeros(len(first.labels), layers)
    for place, token in places(first).items():
        sums = [grids.get(place, grids["last"]).clamp(min=0).sum(-1) for grids in attributed]
        grid[token] = torch.stack(sums).mean(0)
    return grid


def _sites(traced: TracedPrompt, neurons: Sequence[tuple[Neuron, float]]) -> list[Site]:
    tokens = places(traced)
    return [
        Site(layer, t := tokens.get(place, traced.last), traced.labels[t], "neuron", value, neuron=index)
        for (place, layer, index), value in neurons
    ]


def _suggestion(
    neurons: Sequence[tuple[Neuron, float]], checked: NeuronCheck | None, best: int, prompts: int
) -> str:
    if checked is None:
        return (
            f"No neuron is strong in enough of the {prompts} prompts, so the answer does not depend on single neurons "
            "here. Give fewer paraphrases, or ones that the model answers; or use causal_trace."
        )
    effect = (
        f"Setting the {len(neurons)} neurons to zero changes the answer's probability from {checked.clean:.2f} to "
        f"{checked.suppressed:.2f} (equally many random neurons: {checked.random_suppressed:.2f}), doubling them to "
        f"{checked.amplified:.2f}"
    )
    if checked.factor < CLEAR_FACTOR:
        return f"{effect}. That is hardly more than chance, so do not rely on them; try causal_trace."
    return (
        f"{effect}. Most of the attribution is in layer {best}: call preview_edits with params.layer near it. "
        "suggest_layers measures where editing works best."
    )
