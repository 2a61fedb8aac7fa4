"""Attribution patching: causal tracing with one backward pass per noise sample instead of many forward passes.

The effect of restoring a state is estimated from the gradient in the corrupted run (Nanda 2023; Syed
et al. 2023, arXiv 2310.10348):  (clean - corrupted) * d log p(answer) / d state. It is fast enough
for large models. The estimate is poor where the answer is far from linear in a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editors.locate.causal import TraceParams, around, window_of
from editors.locate.result import Located, top_sites
from editors.locate.traced_prompt import TracedPrompt, TracedRun, embed, noise_of, run, tokenize_fact
from editors.model.activations import folded
from editors.model.lm import LM
from editors.progress import ReportProgress

SAMPLES_AT_ONCE = 4  # noise samples in one batch; their activations stay in memory for the backward pass


def approximate_effects(
    lm: LM, traced: TracedPrompt, params: TraceParams, report: ReportProgress
) -> dict[str, Tensor]:
    """Estimated effects on the answer's log-probability, in nats: one grid (tokens, layers, samples) per kind."""
    with torch.no_grad():
        clean = run(lm, traced, embed(lm, traced))
    noise = noise_of(lm, traced, params.samples, params.noise, params.seed)
    effects: dict[str, list[Tensor]] = {"state": [], "mlp": [], "attention": []}
    for at in range(0, params.samples, SAMPLES_AT_ONCE):
        report(at / params.samples, "attribution patching")
        with torch.enable_grad():
            embeds = (embed(lm, traced) + noise[at : at + SAMPLES_AT_ONCE]).requires_grad_()
            corrupted = run(lm, traced, embeds, detach=False)
            for kind, grid in _products(clean, corrupted).items():
                effects[kind].append(grid[: len(traced.labels)])
    return {kind: torch.cat(parts, -1) for kind, parts in effects.items()}


def _products(clean: TracedRun, corrupted: TracedRun) -> dict[str, Tensor]:
    """(clean - corrupted) . gradient: one grid (S, layers, n) per kind."""
    states = {
        "state": (clean.hidden[1:], corrupted.hidden[1:]),
        "mlp": (clean.mlp, corrupted.mlp),
        "attention": (clean.attention, corrupted.attention),
    }
    # A decoder's first states do not depend on the encoder's input, so they have no gradient.
    flat = [
        tensor
        for _, corrupted_states in states.values()
        for tensor in corrupted_states
        if tensor.requires_grad
    ]
    gradients = iter(torch.autograd.grad(corrupted.logprob.sum(), flat, allow_unused=True))
    products = {}
    for kind, (clean_states, corrupted_states) in states.items():
        rows = []
        for a, b in zip(clean_states, corrupted_states, strict=True):
            g = next(gradients) if b.requires_grad else None
            shape = (len(corrupted.logprob), a.shape[1], a.shape[2])  # OPT flattens rows and tokens
            change = a.to(b.device) - folded(b.detach()).reshape(shape)
            slope = None if g is None else folded(g).reshape(shape)
            rows.append(change.new_zeros(shape[:2]) if slope is None else (change * slope).float().sum(-1))
        products[kind] = torch.stack([r.cpu() for r in rows]).permute(2, 0, 1).detach()  # (S, layers, n)
    return products


def attribution_patching(
    lm: LM, prompt: str, subject: str, target: str | None, params: TraceParams, report: ReportProgress
) -> Located:
    """Estimate the maps of `causal_trace`, with the same arguments. Raises InvalidEdit, and what `report` raises."""
    traced = tokenize_fact(lm, prompt, subject, target)
    effects = approximate_effects(lm, traced, params, report)
    window = window_of(lm, params.window)
    for kind in ("mlp", "attention"):  # to first order, a window's effect is the sum of its layers' effects
        effects[kind] = torch.stack(
            [_window_sum(effects[kind], layer, window) for layer in range(lm.n_layers)], 1
        )
    maps = {str(kind): effects[kind].mean(-1) for kind in params.kinds}
    token = traced.last_subject if traced.last_subject is not None else 0
    kind = "mlp" if "mlp" in maps else next(iter(maps))  # the kind that the best layer is chosen by
    best = int(maps[kind][token].argmax())
    sample_best = effects[kind][token].argmax(0)  # (n,)
    agreement = float(((sample_best - best).abs() <= max(1, window // 2)).float().mean())
    return Located(
        method="attribution_patching",
        traced=traced,
        maps=maps,
        unit="approximate effect on the answer's log-probability, nats",
        sites=top_sites(traced, maps),
        best_layer=best,
        confidence=agreement,
        suggestion=(
            f"The {kind} outputs around layer {best} at token {traced.labels[token].strip()!r} have the greatest "
            "estimated effect. Confirm it with causal_trace, or let suggest_layers measure edits there."
        ),
        numbers={"window": window, "samples": params.samples, "seed": params.seed},
    )


def _window_sum(grid: Tensor, layer: int, window: int) -> Tensor:
    """Sum of a grid (tokens, layers, n) over the window around a layer: (tokens, n)."""
    first, last = around(layer, window, grid.shape[1])
    return grid[:, first : last + 1].sum(1)
