"""Causal tracing (Meng et al., NeurIPS 2022, arXiv 2202.05262, section 2 and appendix B).

    clean run      the answer has probability p
    corrupted run  noise on the subject's embeddings: p*          total effect     p - p*
    restored run   corrupted, with one clean state put back: p'   indirect effect  p' - p*

A single state is restored at (token, layer); of MLP and attention outputs, a window of layers
around it. Everything is averaged over the noise samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.locate.restore import KINDS, Kind, Restoration, restored
from editors.locate.result import Located, top_sites
from editors.locate.traced_prompt import Run, TracedPrompt, embed, noise_of, run, tokenize_fact
from editors.model.lm import LM
from editors.progress import ReportProgress

WINDOW_SHARE = 10 / 48  # of the layers: the paper's ten of GPT-2 XL's 48


@dataclass(frozen=True)
class TraceParams:
    """`samples` noise samples of `noise` standard deviations; windows of `window` layers (None: 10 of 48)."""

    samples: int = 5
    noise: float = 3.0
    window: int | None = None
    seed: int = 0
    kinds: Sequence[Kind] = KINDS


@dataclass(frozen=True)
class Trace:
    """The effects behind a trace, per noise sample."""

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
    return max(1, round(lm.n_layers * WINDOW_SHARE)) if window is None else min(window, lm.n_layers)


def around(layer: int, window: int, layers: int) -> tuple[int, int]:
    """First and last layer of a window around `layer`, cut at the ends."""
    return max(0, layer - window // 2), min(layers, layer + (window + 1) // 2) - 1


def sites_of(lm: LM, traced: TracedPrompt, window: int, kinds: Sequence[Kind]) -> list[Restoration]:
    """Every restoration that can change anything: tokens from the subject's first on."""
    first = 0 if lm.is_seq2seq else traced.subject.start
    found = []
    for kind in kinds:
        for token in range(first, len(traced.labels)):
            for layer in range(lm.n_layers):
                ends = (layer, layer) if kind == "state" else around(layer, window, lm.n_layers)
                found.append(Restoration(kind, (token,), *ends))
    return found


@torch.no_grad()
def corrupted_runs(lm: LM, traced: TracedPrompt, params: TraceParams) -> tuple[Run, Run]:
    """The clean run (one row) and the corrupted one (a row per noise sample)."""
    embeds = embed(lm, traced)
    noise = noise_of(lm, traced, params.samples, params.noise, params.seed)
    return run(lm, traced, embeds), run(lm, traced, embeds + noise, parts=False)


def trace(lm: LM, traced: TracedPrompt, params: TraceParams, report: ReportProgress) -> Trace:
    """All restorations of a traced prompt. `report` may raise to cancel."""
    window = window_of(lm, params.window)
    clean, corrupted = corrupted_runs(lm, traced, params)
    sites = sites_of(lm, traced, window, params.kinds)
    found = restored(lm, traced, clean, corrupted, sites, report)
    low = corrupted.probability.cpu()
    shape = (len(traced.labels), lm.n_layers, params.samples)
    maps: dict[Kind, Tensor] = {kind: low.expand(shape).clone() for kind in params.kinds}
    tokens = len(traced.labels) - (0 if lm.is_seq2seq else traced.subject.start)
    for kind, part in zip(params.kinds, found.split(tokens * lm.n_layers), strict=True):
        maps[kind][len(traced.labels) - tokens :] = part.reshape(tokens, lm.n_layers, params.samples)
    return Trace(traced, float(clean.probability[0]), low, maps, window)


def causal_trace(
    lm: LM, prompt: str, subject: str, target: str | None, params: TraceParams, report: ReportProgress
) -> Located:
    """Where restoring a clean state brings the answer back. Raises InvalidEdit, or what `report` raises."""
    if params.samples < 1:
        raise InvalidEdit(f"samples is {params.samples}; at least one noise sample is needed")
    traced = tokenize_fact(lm, prompt, subject, target)
    found = trace(lm, traced, params, report)
    maps = {kind: found.effects(kind).mean(-1) for kind in params.kinds}
    spread = {kind: _standard_error(found.effects(kind)) for kind in params.kinds}
    judged: Kind = "mlp" if "mlp" in maps else params.kinds[0]
    token = _telling_token(traced, maps[judged])
    best = int(maps[judged][token].argmax())
    own = found.effects(judged)[token].argmax(0)  # (n,) each sample's own best layer
    agree = float(((own - best).abs() <= max(1, found.window // 2)).float().mean())
    total = found.total
    numbers = {
        "p_clean": found.clean,
        "p_corrupted": float(found.corrupted.mean()),
        "total_effect": float(total.mean()),
        "total_effect_spread": float(_standard_error(total)),
        "window": found.window,
        "samples": params.samples,
        "seed": params.seed,
    }
    return Located(
        method="causal_trace",
        traced=traced,
        maps={str(k): v for k, v in maps.items()},
        unit="indirect effect on the answer's probability",
        sites=top_sites(traced, {str(k): v for k, v in maps.items()}, {str(k): v for k, v in spread.items()}),
        best_layer=best,
        confidence=agree,
        suggestion=_suggestion(found, judged, token, best, float(maps[judged][token, best]), agree),
        numbers=numbers,
    )


def _telling_token(traced: TracedPrompt, grid: Tensor) -> int:
    """The subject's last token, unless another of its tokens does more than twice as much."""
    if traced.last_subject is None:
        return 0
    highest = grid.max(1).values
    strongest = max(traced.subject, key=lambda t: float(highest[t]))
    return strongest if highest[strongest] > 2 * highest[traced.last_subject] else traced.last_subject


def _standard_error(values: Tensor) -> Tensor:
    n = values.shape[-1]
    return values.std(-1) / n**0.5 if n > 1 else torch.zeros(values.shape[:-1])


def _suggestion(found: Trace, kind: Kind, token: int, best: int, effect: float, agree: float) -> str:
    traced, total = found.traced, float(found.total.mean())
    if found.clean < 0.05:
        return (
            f"The model gives {traced.answer.strip()!r} only a probability of {found.clean:.2f}, so there is little to "
            "locate; check_facts shows what it believes instead."
        )
    if total < 0.1 * found.clean:
        return (
            f"Noise on the subject hardly lowers the answer ({found.clean:.2f} to {found.clean - total:.2f}): it does "
            "not hang on the subject's name here, so an edit at the subject may not hold. Try another prompt."
        )
    where = f"token {traced.labels[token].strip()!r}"
    share = effect / total
    if share < 0.1:
        return (
            f"No single window of layers at {where} brings the answer back (best: layer {best}, {share:.0%} of the "
            "total effect); the fact is spread out. suggest_layers measures where an edit works."
        )
    near = (
        "the noise samples agree"
        if agree >= 0.8
        else f"only {agree:.0%} of the noise samples agree; raise samples"
    )
    apart = (
        ""
        if token == (traced.last_subject or token)
        else f" Editors write at the subject's last token, {traced.labels[traced.last_subject or 0].strip()!r}."
    )
    return (
        f"The {kind} outputs around layer {best} at {where} bring back {share:.0%} of what noise on the subject "
        f"destroys ({near}). To change the fact, preview_edits with params.layer near {best}; suggest_layers measures "
        f"where editing works best, which tracing alone does not tell.{apart}"
    )
