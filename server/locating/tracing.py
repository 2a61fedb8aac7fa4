"""Where a fact lives and where to edit it: the use cases behind the toolset `locate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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

MOST_TRIED = 8  # edits of a suggestion that are tried
TRACED = 2  # of them also traced, for comparison


@dataclass(frozen=True)
class Question:
    """What to locate, and how."""

    prompt: str
    subject: str
    target: str | None = None
    method: LocateMethod = "causal_trace"
    paraphrases: Sequence[str] = field(default=())
    samples: int = 5
    window: int | None = None
    seed: int = 0


def locate(workspace: Workspace, question: Question, ctx: RequestContext) -> tuple[FactLocation, bytes]:
    """The answer and its heat map. The trace is kept on the ledger. Holds no lock: the caller does."""
    started = time.monotonic()
    if question.window is not None and question.window > workspace.lm.n_layers:
        raise InvalidEdit(f"window {question.window} is more than the model's {workspace.lm.n_layers} layers")
    found = _run(workspace, question, _reporter(ctx))
    traced = found.traced
    answer = FactLocation(
        method=question.method,
        prompt=traced.text,
        subject=question.subject.strip(),
        answer=traced.answer.strip() or traced.answer,
        tokens=list(traced.labels),
        subject_tokens=[] if traced.decoder_ids else list(traced.subject),
        sites=[LocatedSite(**vars(site)) for site in found.sites],
        best_layer=found.best_layer,
        confidence=found.confidence,
        unit=found.unit,
        suggestion=found.suggestion,
        numbers=found.numbers,
        seconds=time.monotonic() - started,
    )
    picture = heat_map(found)
    event = remember_trace(workspace, _payload(workspace, answer, found), ctx)
    return answer.model_copy(update={"event": event, "seconds": time.monotonic() - started}), picture


def _run(workspace: Workspace, q: Question, report: ReportProgress) -> Located:
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


def _payload(workspace: Workspace, answer: FactLocation, found: Located) -> dict[str, Any]:
    """What the ledger keeps: the answer, and the maps to four digits."""
    kept = answer.model_dump(exclude={"seconds", "event", "tokens"})
    maps = {name: [[round(float(v), 4) for v in row] for row in grid] for name, grid in found.maps.items()}
    return kept | {"tokens": answer.tokens, "maps": maps, "weights_hash": workspace.host.weights_hash}


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
        method = choose_method(workspace.lm, edits, workspace.active_subjects).method
    editor = editor_named(method)
    name = layer_field(editor)
    rest = {k: v for k, v in (params or {}).items() if k not in ("layer", "layers")}
    sets, own = candidates_of(workspace, editor, rest)
    if layers:
        width = len(sets[own])
        wanted = {end: list(range(end - width + 1, end + 1)) for end in sorted(set(layers))}
        if bad := [end for end, s in wanted.items() if s[0] < 0 or end >= workspace.lm.n_layers]:
            raise InvalidEdit(
                f"layers {bad} cannot be tried: {method} changes {width} layer(s) up to the named one, and the model "
                f"has layers 0 to {workspace.lm.n_layers - 1}"
            )
        wanted[sets[own][-1]] = sets[own]
        mine = sets[own]
        sets = [wanted[end] for end in sorted(wanted)]
        own = sets.index(mine)
    tried = list(edits[:MOST_TRIED])
    found = LayerTrial(workspace, editor, tried, rest, workspace.host.stack).run(sets, own, ctx)
    found = _with_traces(workspace, tried, found, ctx)
    best = best_of(found)
    kept = remember_layers(workspace, method, best.layers, [c.model_dump() for c in found], ctx)
    answer = LayerSuggestion(
        method=method,
        candidates=found,
        best=best.layers,
        suggestion=_advice(name, found, best, kept),
        remembered=kept,
        edits=len(tried),
        seconds=time.monotonic() - started,
    )
    return answer, _picture(found, best, method, len(tried))


def _with_traces(
    workspace: Workspace, edits: Sequence[Edit], found: list[LayerCandidate], ctx: RequestContext
) -> list[LayerCandidate]:
    """The candidates with what tracing says of the MLPs around them, at the subject's last token."""
    profiles = []
    for edit in edits[:TRACED]:
        ctx.check()
        try:
            profiles.append(mlp_profile(workspace, edit, ctx))
        except EditError:  # shown for comparison alone; an edit that cannot be traced is none the worse
            continue
    if not profiles:
        return found
    mean = torch.stack(profiles).mean(0)
    return [c.model_copy(update={"traced_effect": float(mean[c.layers[-1]])}) for c in found]


def mlp_profile(workspace: Workspace, edit: Edit, ctx: RequestContext) -> torch.Tensor:
    """Indirect effects (layers,) of MLP windows at the subject's last token on the model's own answer."""
    lm, params = workspace.lm, TraceParams(samples=3)
    with lm.unrouted():
        traced = tokenize_fact(lm, edit.text, edit.subject, None)
        clean, corrupted = corrupted_runs(lm, traced, params)
        window, token = window_of(lm, None), traced.last_subject or 0
        sites = [Restoration("mlp", (token,), *around(i, window, lm.n_layers)) for i in range(lm.n_layers)]
        p = restored(lm, traced, clean, corrupted, sites, _reporter(ctx))
    return (p - corrupted.probability.cpu()).mean(-1)


def _advice(name: str, found: Sequence[LayerCandidate], best: LayerCandidate, kept: bool) -> str:
    own = next(c for c in found if c.default)
    listed = ", ".join(map(str, best.layers))
    told = (
        f"The method's own choice, layer {listed}, is as good as any tried"
        if best.default
        else f"Layer {listed} does better than the method's own choice, {', '.join(map(str, own.layers))} "
        f"(score {best.score:.2f} to {own.score:.2f})"
    )
    traced = [c for c in found if c.traced_effect is not None]
    if traced:
        top = max(traced, key=lambda c: c.traced_effect or 0.0)
        same = top.layers == best.layers
        told += (
            "; causal tracing points there too"
            if same
            else f"; causal tracing alone would say {top.layers[-1]}"
        )
    value = best.layers[0] if name == "layer" else best.layers
    auto = f' or {{"{name}": "auto"}}' if kept else ""
    return f'{told}. Use it with params={{"{name}": {value}}}{auto} in apply_edits.'


def _picture(found: Sequence[LayerCandidate], best: LayerCandidate, method: str, n: int) -> bytes:
    labels = [f"{c.layers[0]}–{c.layers[-1]}" if len(c.layers) > 1 else str(c.layers[0]) for c in found]
    labels = [label + ("\n(default)" if c.default else "") for label, c in zip(labels, found, strict=True)]
    curves = [
        Curve("reliability", [c.reliability for c in found], "#1f5fa8", "o"),
        Curve("generality", [c.generality for c in found], "#2a7f3f", "s"),
        Curve("locality", [c.locality for c in found], "#c2402a", "^"),
    ]
    effects = [c.traced_effect for c in found]
    traced = [max(e, 0.0) for e in effects if e is not None]
    title = f"{method}: where editing works, {n} edit{'s' if n > 1 else ''}"
    return trade_off(labels, curves, traced if len(traced) == len(found) else None, found.index(best), title)
