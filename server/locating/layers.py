"""Which layer to edit: small experiments, measured and discarded, and what `layer="auto"` means.

Causal tracing does not tell where editing works best (Hase et al., NeurIPS 2023, arXiv
2301.04213), so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.measure import Observation, observe, outcomes
from editors.method import Editor, Params
from editors.patch import save
from editors.steering.stack import unsteered
from server.facts.reports import mean_rate, outcome_result
from server.locating.remembered import best_layers, remember_layers
from server.locating.results import LayerCandidate
from server.request_context import RequestContext
from server.results import EditOutcome
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, checked_params, digest

AUTO = "auto"
DEPTHS = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5)  # of the model, where candidates lie
AT_HAND = 4  # edits tried when `layer="auto"` has nothing to remember
MARGIN = 0.03  # by which another layer must beat the method's own choice
LAST = 2**62  # position of a patch that is never recorded


def layer_field(editor: Editor[Any]) -> str:
    """The parameter that says where a method edits. Raises InvalidEdit when it has none."""
    for name in ("layer", "layers"):
        if name in editor.params.model_fields:
            return name
    raise InvalidEdit(f"{editor.name} has no parameter layer or layers; there is no layer to choose")


def candidates_of(
    workspace: Workspace, editor: Editor[Any], params: dict[str, Any]
) -> tuple[list[list[int]], int]:
    """Sets of layers to try, shallow to deep, and the index of the method's own choice."""
    own = _layers(checked_params(editor, workspace.lm, params), layer_field(editor))
    if not own:
        raise InvalidEdit(f"{editor.name} names no layers of its own; there is nothing to compare with")
    n, width = workspace.lm.n_layers, own[-1] - own[0] + 1
    deepest = {min(n - 2, max(width - 1, round(depth * n))) for depth in DEPTHS} if n > 2 else {own[-1]}
    ends = sorted(deepest | {own[-1]})
    sets = [own if end == own[-1] else list(range(end - width + 1, end + 1)) for end in ends]
    return sets, ends.index(own[-1])


def _layers(params: Params, name: str) -> list[int]:
    value = getattr(params, name)
    return [value] if isinstance(value, int) else sorted(value or ())


@dataclass(frozen=True)
class Experiment:
    """What every candidate is measured with."""

    workspace: Workspace
    editor: Editor[Any]
    edits: Sequence[Edit]
    params: dict[str, Any]  # without the layers
    stack: Sequence[ActivePatch]  # beneath the edits

    def run(self, sets: Sequence[Sequence[int]], own: int, ctx: RequestContext) -> list[LayerCandidate]:
        """Edit at each set of layers, measure, discard. Raises EditError or Cancelled; nothing stays."""
        name = layer_field(self.editor)
        chosen = [
            checked_params(
                self.editor, self.workspace.lm, self.params | {name: s[0] if name == "layer" else list(s)}
            )
            for s in sets
        ]
        self._prepare(chosen, ctx)
        groups = [self.edits] if self.editor.batch else [[edit] for edit in self.edits]
        with self.workspace.host.trial(self.stack):
            before = [observe(self.workspace.lm, group) for group in groups]
        found = []
        for i, (layers, params) in enumerate(zip(sets, chosen, strict=True)):
            ctx.check()
            ctx.progress(i, len(sets), f"trying layer {', '.join(map(str, layers))}")
            trials = [self._try(params, g, b, ctx) for g, b in zip(groups, before, strict=True)]
            found.append(_candidate(list(layers), trials, i == own))
        return found

    def _prepare(self, chosen: Sequence[Params], ctx: RequestContext) -> None:
        """Second moments of all candidates in one pass."""
        workspace = self.workspace
        needed = {i for p in chosen for i in self.editor.layers_needed(workspace.lm, p)}
        sample = getattr(chosen[0], "sample", "self")
        missing = workspace.statistics.missing(sorted(needed), sample) if sample == "self" else []
        if missing:
            with workspace.host.pristine():
                workspace.statistics.ensure(
                    workspace.lm, missing, lambda f, m: _tell(ctx, f, f"{m} (once per model)")
                )
        workspace.prepare(self.editor, chosen[0], ctx)

    def _try(
        self, params: Params, edits: Sequence[Edit], before: Observation, ctx: RequestContext
    ) -> tuple[list[EditOutcome], float]:
        """Outcomes of one patch, and its drift."""
        workspace = self.workspace
        with workspace.host.trial(self.stack):
            with unsteered(workspace.lm):
                patch = self.editor.compute(workspace.lm, edits, params, workspace.context(ctx))
            new = ActivePatch(
                -1, LAST, self.editor.name, patch, tuple(range(len(edits))), digest(save(patch))
            )
            workspace.host.set_stack([*self.stack, new])
            found = outcomes(edits, before, observe(workspace.lm, edits))
            drift = workspace.drift().kl
        return [outcome_result(e, o) for e, o in zip(edits, found, strict=True)], drift


def _candidate(
    layers: list[int], trials: Sequence[tuple[list[EditOutcome], float]], own: bool
) -> LayerCandidate:
    """One row of the table: means over the edits."""
    results = [result for found, _ in trials for result in found]
    rates = {name: mean_rate(results, name) for name in ("reliability", "generality", "locality")}
    return LayerCandidate(
        layers=layers,
        reliability=rates["reliability"] or 0.0,
        generality=rates["generality"],
        locality=rates["locality"],
        p_target=sum(r.p_target_after for r in results) / len(results),
        drift=sum(drift for _, drift in trials) / len(trials),
        score=_score([v for v in rates.values() if v is not None]),
        default=own,
    )


def _tell(ctx: RequestContext, fraction: float, message: str) -> None:
    ctx.check()
    ctx.progress(fraction, 1.0, message)


def _score(rates: Sequence[float]) -> float:
    """Harmonic mean: no rate makes up for another."""
    return len(rates) / sum(1 / max(r, 0.01) for r in rates)


def best_of(found: Sequence[LayerCandidate]) -> LayerCandidate:
    """The best score, ties by the target's probability; the method's own choice unless clearly beaten."""
    best = max(found, key=lambda c: (round(c.score, 6), c.p_target))
    own = next(c for c in found if c.default)
    return best if best.score > own.score + MARGIN else own


def resolve_auto(
    workspace: Workspace,
    editor: Editor[Any],
    params: dict[str, Any] | None,
    edits: Sequence[Edit],
    stack: Sequence[ActivePatch],
    ctx: RequestContext,
) -> tuple[dict[str, Any] | None, str]:
    """The parameters with `layer="auto"` replaced, and what was done about it ('' when nothing was)."""
    asked = [name for name in ("layer", "layers") if (params or {}).get(name) == AUTO]
    if not asked or params is None:
        return params, ""
    name = layer_field(editor)
    rest = {k: v for k, v in params.items() if k not in asked}
    layers = best_layers(workspace, editor.name)
    if layers is not None:
        why = f"layer {', '.join(map(str, layers))} was suggested by an earlier suggest_layers"
    else:
        tried = list(edits[:AT_HAND])
        sets, own = candidates_of(workspace, editor, rest)
        found = Experiment(workspace, editor, tried, rest, stack).run(sets, own, ctx)
        layers = best_of(found).layers
        kept = remember_layers(workspace, editor.name, layers, [c.model_dump() for c in found], ctx)
        why = f"layer {', '.join(map(str, layers))} did best in a trial with {len(tried)} of these edits"
        why += "; it is remembered for this method and model" if kept else ""
    return rest | {name: layers[0] if name == "layer" else layers}, why
