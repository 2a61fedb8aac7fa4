"""Find where a fact is stored and which layer to edit: the use cases behind the toolset `locate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from editors.constants import limit
from editors.edit import Edit
from editors.errors import EditError, InvalidEdit
from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams, around, causal_trace, corrupted_runs, window_of
from editors.locate.heat_map import heat_map
from editors.locate.lens import logit_lens
from editors.locate.neurons import NeuronParams, knowledge_neurons
from editors.locate.restore import Restoration, restored
from editors.locate.result import Located
from editors.locate.traced_prompt import tokenize_fact
from editors.locate.trade_off import Curve, trade_off
from editors.progress import ReportProgress
from server.facts.auto_method import choose_method
from server.facts.layer_trials import LayerTrial, best_of, candidates_of, layer_field
from server.facts.remembered import remember_layers, remember_trace
from server.facts.results import LayerCandidate
from server.locating.results import FactLocation, LayerSuggestion, LocatedSite, LocateMethod
from server.methods import editor_named
from server.request_context import RequestContext
from server.transaction.workspace import Workspace

MOST_TRIED = limit(
    8,
    "edits that suggest_layers tries, at most",
    "time: each is tried at every layer; further ones are left out",
)
TRACED = limit(
    2,
    "edits of suggest_layers that are also traced, at most",
    "time: traces are shown for comparison and choose nothing",
)
TRACE_SAMPLES = limit(
    3,
    "noise samples of such a trace",
    "time: traces are shown for comparison and choose nothing",
)


@dataclass(frozen=True)
class LocateRequest:
    """What to locate, and how."""

    prompt: str
    subject: str
    target: str | None = None
    method: LocateMethod = "causal_trace"
    paraphrases: Sequence[str] = field(default=())
    samples: int = 5
    window: int | None = None
    seed: int = 0


def locate(workspace: Workspace, question: LocateRequest, ctx: RequestContext) -> tuple[FactLocation, bytes]:
    """Locate a fact and record the result. Returns it with its heat map (PNG). The caller holds the lock."""
    started = time.monotonic()
    if question.window is not None and question.window > workspace.lm.n_layers:
        raise InvalidEdit(f"window {question.window} is more than the model's {workspace.lm.n_layers} layers")
    located = _run(workspace, question, _reporter(ctx))
    traced = located.traced
    result = FactLocation(
        method=question.method,
        prompt=traced.text,
        subject=question.subject.strip(),
        answer=traced.answer.strip() or traced.answer,
        tokens=list(traced.labels),
        subject_tokens=[] if traced.decoder_ids else list(traced.subject),
        sites=[LocatedSite(**vars(site)) for site in located.sites],
        best_layer=located.best_layer,
        confidence=located.confidence,
        unit=located.unit,
        suggestion=located.suggestion,
        numbers=located.numbers,
        seconds=time.monotonic() - started,
    )
    picture = heat_map(located)
    event = remember_trace(workspace, _payload(workspace, result, located), ctx)
    return result.model_copy(update={"event": event, "seconds": time.monotonic() - started}), picture


def _run(workspace: Workspace, q: LocateRequest, report: ReportProgress) -> Located:
    params = TraceParams(samples=q.samples, window=q.window, seed=q.seed)
    with workspace.lm.unrouted():
        if q.method == "knowledge_neurons":
            neurons = NeuronParams(seed=q.seed)
            return knowledge_neurons(
                workspace.lm, q.prompt, q.subject, q.target, q.paraphrases, neurons, report
            )
        if q.method == "logit_lens":
            return logit_lens(workspace.lm, q.prompt, q.subject, q.target, report)
        if q.method == "attribution_patching":
            return attribution_patching(workspace.lm, q.prompt, q.subject, q.target, params, report)
        return causal_trace(workspace.lm, q.prompt, q.subject, q.target, params, report)


def _reporter(ctx: RequestContext, start: float = 0.0, span: float = 1.0) -> ReportProgress:
    def report(fraction: float, message: str) -> None:
        ctx.check()
        ctx.progress(start + span * fraction, 1.0, message)

    return report


def _payload(workspace: Workspace, result: FactLocation, located: Located) -> dict[str, Any]:
    """What the ledger records: the result, and the maps rounded to four digits."""
    fields = result.model_dump(exclude={"seconds", "event", "tokens"})
    maps = {name: [[round(float(v), 4) for v in row] for row in grid] for name, grid in located.maps.items()}
    return fields | {"tokens": result.tokens, "maps": maps, "weights_hash": workspace.host.weights_hash}


# --- layers --------------------------------------------------------------------------------------


def suggest_layers(
    workspace: Workspace,
    edits: Sequence[Edit],
    method: str,
    layers: Sequence[int] | None,
    params: dict[str, Any] | None,
    ctx: RequestContext,
) -> tuple[LayerSuggestion, bytes]:
    """Measure edits at candidate layers, and remember the best. The caller holds the lock."""
    started = time.monotonic()
    if method == "auto":
        method = choose_method(workspace.lm, edits, workspace.subjects_in_weights).method
    editor = editor_named(method)
    name = layer_field(editor)
    rest = {k: v for k, v in (params or {}).items() if k not in ("layer", "layers")}
    sets, own = candidates_of(workspace, editor, rest)
    if layers:
        sets, own = _named_sets(method, layers, sets[own], workspace.lm.n_layers)
    tried = list(edits[:MOST_TRIED])
    candidates = LayerTrial(workspace, editor, tried, rest, workspace.host.stack).run(sets, own, ctx)
    candidates = _with_traces(workspace, tried, candidates, ctx)
    best = best_of(candidates)
    remembered = remember_layers(workspace, method, best.layers, [c.model_dump() for c in candidates], ctx)
    result = LayerSuggestion(
        method=method,
        candidates=candidates,
        best=best.layers,
        suggestion=_advice(name, candidates, best, remembered),
        remembered=remembered,
        edits=len(tried),
        seconds=time.monotonic() - started,
    )
    return result, _picture(candidates, best, method, len(tried))


def _named_sets(
    method: str, layers: Sequence[int], default: list[int], n_layers: int
) -> tuple[list[list[int]], int]:
    """The sets of layers that end at each of `layers`, with the method's default; and the default's index.

    All sets are as large as the default. Raises InvalidEdit for layers that the model does not have.
    """
    width = len(default)
    by_last = {last: list(range(last - width + 1, last + 1)) for last in sorted(set(layers))}
    if bad := [last for last, each in by_last.items() if each[0] < 0 or last >= n_layers]:
        raise InvalidEdit(
            f"layers {bad} cannot be tried: {method} changes {width} layer(s) up to the named one, and the model "
            f"has layers 0 to {n_layers - 1}"
        )
    by_last[default[-1]] = default
    sets = [by_last[last] for last in sorted(by_last)]
    return sets, sets.index(default)


def _with_traces(
    workspace: Workspace, edits: Sequence[Edit], candidates: list[LayerCandidate], ctx: RequestContext
) -> list[LayerCandidate]:
    """The candidates with the traced effect of the MLPs around them, at the subject's last token."""
    profiles = []
    for edit in edits[:TRACED]:
        ctx.check()
        try:
            profiles.append(mlp_profile(workspace, edit, ctx))
        except (
            EditError
        ):  # the trace is only shown for comparison, so an edit that cannot be traced is still tried
            continue
    if not profiles:
        return candidates
    mean = torch.stack(profiles).mean(0)
    return [c.model_copy(update={"traced_effect": float(mean[c.layers[-1]])}) for c in candidates]


def mlp_profile(workspace: Workspace, edit: Edit, ctx: RequestContext) -> torch.Tensor:
    """Indirect effects (layers,) of MLP windows at the subject's last token, on the model's own answer."""
    lm, params = workspace.lm, TraceParams(samples=TRACE_SAMPLES)
    with lm.unrouted():
        traced = tokenize_fact(lm, edit.text, edit.subject, None)
        clean, corrupted = corrupted_runs(lm, traced, params)
        window, token = window_of(lm, None), traced.last_subject or 0
        sites = [Restoration("mlp", (token,), *around(i, window, lm.n_layers)) for i in range(lm.n_layers)]
        p = restored(lm, traced, clean, corrupted, sites, _reporter(ctx))
    return (p - corrupted.probability.cpu()).mean(-1)


def _advice(name: str, candidates: Sequence[LayerCandidate], best: LayerCandidate, remembered: bool) -> str:
    default = next(c for c in candidates if c.default)
    listed = ", ".join(map(str, best.layers))
    comparison = (
        f"No other layer tried is better than the method's default, layer {listed}"
        if best.default
        else f"Layer {listed} is better than the method's default, {', '.join(map(str, default.layers))} "
        f"(score {best.score:.2f} against {default.score:.2f})"
    )
    traced = [c for c in candidates if c.traced_effect is not None]
    if traced:
        top = max(traced, key=lambda c: c.traced_effect or 0.0)
        comparison += (
            "; causal tracing gives the same layer"
            if top.layers == best.layers
            else f"; causal tracing alone would give layer {top.layers[-1]}"
        )
    value = best.layers[0] if name == "layer" else best.layers
    auto = f' or {{"{name}": "auto"}}' if remembered else ""
    return f'{comparison}. Use it with params={{"{name}": {value}}}{auto} in apply_edits.'


def _picture(candidates: Sequence[LayerCandidate], best: LayerCandidate, method: str, n: int) -> bytes:
    labels = [f"{c.layers[0]}–{c.layers[-1]}" if len(c.layers) > 1 else str(c.layers[0]) for c in candidates]
    labels = [
        label + ("\n(default)" if c.default else "") for label, c in zip(labels, candidates, strict=True)
    ]
    curves = [
        Curve("reliability", [c.reliability for c in candidates], "#1f5fa8", "o"),
        Curve("generality", [c.generality for c in candidates], "#2a7f3f", "s"),
        Curve("locality", [c.locality for c in candidates], "#c2402a", "^"),
    ]
    effects = [max(c.traced_effect, 0.0) for c in candidates if c.traced_effect is not None]
    title = f"{method}: where editing works, {n} edit{'s' if n > 1 else ''}"
    traced = effects if len(effects) == len(candidates) else None
    return trade_off(labels, curves, traced, candidates.index(best), title)
