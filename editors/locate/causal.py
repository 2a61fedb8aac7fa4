"""Causal tracing (Meng et al., NeurIPS 2022, arXiv 2202.05262, section 2 and appendix B).

    clean run      the answer has probability p
    corrupted run  noise on the subject's embeddings: p*          total effect     p - p*
    restored run   corrupted, with one clean state put back: p'   indirect effect  p' - p*

Of states, one is restored at (token, layer). Of MLP and attention outputs, a window of layers around
it is restored. All effects are averaged over the noise samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import limit, published
from editors.errors import InvalidEdit
from editors.locate.restore import KINDS, Kind, Restoration, restored
from editors.locate.result import Located, top_sites
from editors.locate.traced_prompt import TracedPrompt, TracedRun, embed, noise_of, run, tokenize_fact
from editors.model.lm import LM
from editors.progress import ReportProgress

WINDOW_SHARE = published(
    10 / 48,
    "share of the layers that a window of MLP or attention outputs covers",
    "Meng et al. 2022, section 2.2: 10 of GPT-2 XL's 48 layers",
)
LITTLE_KNOWN = limit(
    0.05,
    "probability of the answer below which a trace says that there is little to locate",
    "decides a sentence of advice alone; the figures of the trace stay the same",
)
WEAK_EFFECT = limit(
    0.1,
    "share of the answer's probability (or of the total effect) below which an effect is called weak",
    "decides a sentence of advice alone; the figures of the trace stay the same",
)
ENOUGH_AGREEMENT = limit(
    0.8,
    "share of the noise samples that must agree on the best layer",
    "decides a sentence of advice alone; the figures of the trace stay the same",
)


@dataclass(frozen=True)
class TraceParams:
    """Parameters of a trace. `window` is a number of layers; None means WINDOW_SHARE of them."""

    samples: int = limit(
        5,
        "noise samples of a trace",
        "time: the code of Meng et al. 2022 takes 10; with fewer the picture is noisier, and no edit reads it",
    )
    noise: float = published(
        3.0,
        "standard deviation of the noise, in standard deviations of the subject's embeddings",
        "Meng et al. 2022, section 2.1",
    )
    window: int | None = None
    seed: int = 0
    kinds: Sequence[Kind] = KINDS


@dataclass(frozen=True)
class Trace:
    """The answer's probabilities in a trace, for each of n noise samples."""

    traced: TracedPrompt
    clean: float  # p
    corrupted: Tensor  # (n,) p*
    restored: dict[Kind, Tensor]  # (tokens, layers, n) p'
    window: int

    @property
    def total(self) -> Tensor:
        """Total effect (n,)."""
        return self.clean - self.corrupted

    def effects(self, kind: Kind) -> Tensor:
        """Indirect effects (tokens, layers, n)."""
        return self.restored[kind] - self.corrupted


def window_of(lm: LM, window: int | None) -> int:
    """Number of layers in a window, at least 1 and at most all of them."""
    return max(1, round(lm.n_layers * WINDOW_SHARE)) if window is None else min(window, lm.n_layers)


def around(layer: int, window: int, layers: int) -> tuple[int, int]:
    """First and last layer of a window around `layer`, cut off at the model's ends."""
    return max(0, layer - window // 2), min(layers, layer + (window + 1) // 2) - 1


def sites_of(lm: LM, traced: TracedPrompt, window: int, kinds: Sequence[Kind]) -> list[Restoration]:
    """All restorations that can have an effect: those at the subject's first token and later."""
    sites = []
    for kind in kinds:
        for token in range(traced.first_site, len(traced.labels)):
            for layer in range(lm.n_layers):
                ends = (layer, layer) if kind == "state" else around(layer, window, lm.n_layers)
                sites.append(Restoration(kind, (token,), *ends))
    return sites


@torch.no_grad()
def corrupted_runs(lm: LM, traced: TracedPrompt, params: TraceParams) -> tuple[TracedRun, TracedRun]:
    """The clean run (one row) and the corrupted run (one row per noise sample)."""
    embeds = embed(lm, traced)
    noise = noise_of(lm, traced, params.samples, params.noise, params.seed)
    return run(lm, traced, embeds), run(lm, traced, embeds + noise, parts=False)


def trace(lm: LM, traced: TracedPrompt, params: TraceParams, report: ReportProgress) -> Trace:
    """Measure all restorations of a traced prompt. Raises only what `report` raises."""
    window = window_of(lm, params.window)
    clean, corrupted = corrupted_runs(lm, traced, params)
    sites = sites_of(lm, traced, window, params.kinds)
    probability = restored(lm, traced, clean, corrupted, sites, report)
    low = corrupted.probability.cpu()
    shape = (len(traced.labels), lm.n_layers, params.samples)
    maps: dict[Kind, Tensor] = {kind: low.expand(shape).clone() for kind in params.kinds}
    tokens = len(traced.labels) - traced.first_site
    for kind, part in zip(params.kinds, probability.split(tokens * lm.n_layers), strict=True):
        maps[kind][len(traced.labels) - tokens :] = part.reshape(tokens, lm.n_layers, params.samples)
    return Trace(traced, float(clean.probability[0]), low, maps, window)


def causal_trace(
    lm: LM, prompt: str, subject: str, target: str | None, params: TraceParams, report: ReportProgress
) -> Located:
    """Find where restoring a clean state brings the answer back.

    Args:
        prompt: a prompt that contains the subject, or {} in its place.
        target: the answer; None: the model's own next token.

    Raises:
        InvalidEdit: for a prompt that cannot be traced, or fewer than one noise sample; and what `report` raises.
    """
    if params.samples < 1:
        raise InvalidEdit(f"samples is {params.samples}; at least one noise sample is needed")
    traced = tokenize_fact(lm, prompt, subject, target)
    result = trace(lm, traced, params, report)
    maps = {str(kind): result.effects(kind).mean(-1) for kind in params.kinds}
    spread = {str(kind): _standard_error(result.effects(kind)) for kind in params.kinds}
    kind: Kind = "mlp" if "mlp" in maps else params.kinds[0]  # the kind that the best layer is chosen by
    token = _strongest_token(traced, maps[kind])
    best = int(maps[kind][token].argmax())
    sample_best = result.effects(kind)[token].argmax(0)  # (n,)
    agreement = float(((sample_best - best).abs() <= max(1, result.window // 2)).float().mean())
    return Located(
        method="causal_trace",
        traced=traced,
        maps=maps,
        unit="indirect effect on the answer's probability",
        sites=top_sites(traced, maps, spread),
        best_layer=best,
        confidence=agreement,
        suggestion=_suggestion(result, kind, token, best, float(maps[kind][token, best]), agreement),
        numbers=_numbers(result, params),
    )


def _numbers(result: Trace, params: TraceParams) -> dict[str, float]:
    total = result.total
    return {
        "p_clean": result.clean,
        "p_corrupted": float(result.corrupted.mean()),
        "total_effect": float(total.mean()),
        "total_effect_spread": float(_standard_error(total)),
        "window": result.window,
        "samples": params.samples,
        "seed": params.seed,
    }


def _strongest_token(traced: TracedPrompt, grid: Tensor) -> int:
    """The subject's last token, unless another of its tokens has more than twice its effect."""
    if traced.last_subject is None:
        return 0
    highest = grid.max(1).values
    strongest = max(traced.subject, key=lambda t: float(highest[t]))
    return strongest if highest[strongest] > 2 * highest[traced.last_subject] else traced.last_subject


def _standard_error(values: Tensor) -> Tensor:
    n = values.shape[-1]
    return values.std(-1) / n**0.5 if n > 1 else torch.zeros(values.shape[:-1])


def _suggestion(result: Trace, kind: Kind, token: int, best: int, effect: float, agreement: float) -> str:
    traced, total = result.traced, float(result.total.mean())
    if result.clean < LITTLE_KNOWN:
        return (
            f"The model gives {traced.answer.strip()!r} a probability of only {result.clean:.2f}, so there is "
            "little to locate. check_facts shows what it answers instead."
        )
    if total < WEAK_EFFECT * result.clean:
        return (
            f"Noise on the subject hardly lowers the answer's probability ({result.clean:.2f} to "
            f"{result.clean - total:.2f}), so the answer does not depend on the subject here, and an edit at the "
            "subject may not work. Try another prompt."
        )
    where = f"token {traced.labels[token].strip()!r}"
    share = effect / total
    if share < WEAK_EFFECT:
        return (
            f"No single window of layers at {where} brings the answer back (best: layer {best}, {share:.0%} of the "
            "total effect), so the fact is spread over many. suggest_layers measures where an edit works."
        )
    certainty = (
        "the noise samples agree"
        if agreement >= ENOUGH_AGREEMENT
        else f"only {agreement:.0%} of the noise samples agree; raise samples"
    )
    other_token = (
        ""
        if token == (traced.last_subject or token)
        else f" Editors write at the subject's last token, {traced.labels[traced.last_subject or 0].strip()!r}."
    )
    return (
        f"Restoring the {kind} outputs around layer {best} at {where} brings back {share:.0%} of the probability that "
        f"noise on the subject takes away ({certainty}). To change the fact, call preview_edits with params.layer near "
        f"{best}. Tracing does not show where editing works best; suggest_layers measures it.{other_token}"
    )
