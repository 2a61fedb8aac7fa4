"""Which layer to edit: small trial edits, measured and discarded; and what `layer="auto"` means.

Where causal tracing finds a fact is not where editing works best (Hase et al., NeurIPS 2023, arXiv 2301.04213),
so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editors.constants import assumed, limit
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.measure import Observation, observe
from editors.method import Editor, Params
from editors.model.caches import last_read
from editors.outcomes import outcomes
from editors.steering.stack import unsteered
from server.facts.measuring import trained_on
from server.facts.rates import mean_rate
from server.facts.remembered import best_layers, remember_layers
from server.facts.reports import edit_outcome
from server.facts.results import EditOutcome, LayerCandidate
from server.methods import checked_params
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace

AUTO = "auto"
DEPTHS = assumed(
    (0.05, 0.1, 0.15, 0.25, 0.35, 0.5),
    "Where suggest_layers tries edits, as shares of the model's depth.",
    "Set by hand, around a sixth of the depth, where the papers edit.",
)
AUTO_EDITS = limit(
    4,
    'edits tried for layer="auto" when no suggestion is remembered, at most',
    "time: each is tried at every layer; the others of the call are made at the layer found",
)
MARGIN = assumed(
    0.03,
    "By how much the score of other layers or parameters must beat that of the method's own to be kept.",
    "Set by hand.",
)


def layer_field(editor: Editor[Any]) -> str:
    """The parameter that says where a method edits. Raises InvalidEdit when it has none."""
    for name in ("layer", "layers"):
        if name in editor.params.model_fields:
            return name
    raise InvalidEdit(f"{editor.name} has no parameter layer or layers; there is no layer to choose")


def candidates_of(
    workspace: Workspace, editor: Editor[Any], params: dict[str, Any]
) -> tuple[list[list[int]], int]:
    """Sets of layers to try, from the first layers up, and the index of the method's own set."""
    own = layers_of(checked_params(editor, workspace.lm, params), layer_field(editor))
    if not own:
        raise InvalidEdit(f"{editor.name} names no layers of its own; there is nothing to compare with")
    n, width = workspace.lm.n_layers, own[-1] - own[0] + 1
    top = last_read(workspace.lm)
    last_layers = (
        {min(top, max(width - 1, round(depth * n))) for depth in DEPTHS}
        if top >= width - 1 and n > 2
        else {own[-1]}
    )
    ends = sorted(last_layers | {own[-1]})
    sets = [own if end == own[-1] else list(range(end - width + 1, end + 1)) for end in ends]
    return sets, ends.index(own[-1])


def layers_of(params: Params, name: str) -> list[int]:
    value = getattr(params, name)
    return [value] if isinstance(value, int) else sorted(value or ())


@dataclass(frozen=True)
class LayerTrial:
    """What every candidate is measured with."""

    workspace: Workspace
    editor: Editor[Any]
    edits: Sequence[Edit]
    params: dict[str, Any]  # without the layers
    stack: Sequence[ActivePatch]  # beneath the edits

    def run(self, sets: Sequence[Sequence[int]], own: int, ctx: RequestContext) -> list[LayerCandidate]:
        """Edit at each set of layers, measure, discard. Raises EditError or Cancelled; nothing stays."""
        workspace, name = self.workspace, layer_field(self.editor)
        all_params = [
            checked_params(
                self.editor, workspace.lm, self.params | {name: s[0] if name == "layer" else list(s)}
            )
            for s in sets
        ]
        self._prepare(all_params, ctx)
        groups = [self.edits] if self.editor.batch else [[edit] for edit in self.edits]
        with Transaction(workspace) as tx:
            tx.stage(self.stack)
            before = [observe(workspace.lm, group) for group in groups]
        candidates = []
        for i, (layers, params) in enumerate(zip(sets, all_params, strict=True)):
            ctx.report(i, len(sets), f"trying layer {', '.join(map(str, layers))}")
            parts = ctx.parts(len(sets) * len(groups))[i * len(groups) :]
            trials = [self._try(params, g, b, p) for g, b, p in zip(groups, before, parts, strict=False)]
            candidates.append(_candidate(list(layers), trials, i == own))
        return candidates

    def _prepare(self, all_params: Sequence[Params], ctx: RequestContext) -> None:
        """Compute the second moments of all candidates in one pass."""
        workspace, sample = self.workspace, getattr(all_params[0], "sample", "self")
        layers = sorted({i for p in all_params for i in self.editor.layers_needed(workspace.lm, p)})
        if sample == "self":
            workspace.ensure_statistics(layers, sample, ctx)
        for params in all_params:
            workspace.prepare(self.editor, params, ctx)

    def _try(
        self, params: Params, edits: Sequence[Edit], before: Observation, ctx: RequestContext
    ) -> tuple[list[EditOutcome], float]:
        """Outcomes of one patch, and its drift (KL, nats)."""
        workspace = self.workspace
        with Transaction(workspace) as tx:
            tx.stage(self.stack)
            with unsteered(workspace.lm):
                patch = self.editor.compute(workspace.lm, edits, params, workspace.edit_context(ctx))
            tx.add(self.editor.name, patch, len(edits))
            trained = trained_on(self.editor.name, patch, edits, params.model_dump(mode="json"))
            measured = outcomes(edits, before, observe(workspace.lm, edits), trained=trained)
            drift = workspace.drift().kl
        return [edit_outcome(e, o) for e, o in zip(edits, measured, strict=True)], drift


def _candidate(
    layers: list[int], trials: Sequence[tuple[list[EditOutcome], float]], own: bool
) -> LayerCandidate:
    """One row of the table: means over the edits."""
    results = [result for outcomes, _ in trials for result in outcomes]
    rates = {name: mean_rate(results, name) for name in ("reliability", "generality", "locality")}
    return LayerCandidate(
        layers=layers,
        reliability=rates["reliability"] or 0.0,
        generality=rates["generality"],
        locality=rates["locality"],
        p_target=sum(r.p_target_after for r in results) / len(results),
        drift=sum(drift for _, drift in trials) / len(trials),
        score=_harmonic_mean([value for value in rates.values() if value is not None]),
        default=own,
    )


def _harmonic_mean(rates: Sequence[float]) -> float:
    """The harmonic mean, in which a high rate cannot make up for a low one."""
    return len(rates) / sum(1 / max(rate, 0.01) for rate in rates)


def best_of(candidates: Sequence[LayerCandidate]) -> LayerCandidate:
    """The best score, ties by the target's probability; the method's own layers unless clearly beaten."""
    best = max(candidates, key=lambda c: (round(c.score, 6), c.p_target))
    own = next(c for c in candidates if c.default)
    return best if best.score > own.score + MARGIN else own


@dataclass(frozen=True)
class LayerChoice:
    """The layers that `layer="auto"` chose. `candidates`: the layers that were tried, recorded when the call
    succeeds."""

    params: dict[str, Any]
    note: str = ""
    layers: Sequence[int] = ()
    candidates: Sequence[LayerCandidate] = ()


def resolve_auto_layer(
    workspace: Workspace,
    editor: Editor[Any],
    params: dict[str, Any],
    edits: Sequence[Edit],
    stack: Sequence[ActivePatch],
    ctx: RequestContext,
) -> LayerChoice:
    """The parameters with `layer="auto"` replaced: by the layers last suggested, or by those a trial finds."""
    auto = [name for name in ("layer", "layers") if params.get(name) == AUTO]
    if not auto:
        return LayerChoice(params)
    name = layer_field(editor)
    rest = {key: value for key, value in params.items() if key not in auto}
    candidates: list[LayerCandidate] = []
    layers = best_layers(workspace, editor.name)
    if layers is not None:
        note = f"layer {', '.join(map(str, layers))} was suggested by an earlier suggest_layers or calibrate_editing"
    else:
        tried = list(edits[:AUTO_EDITS])
        sets, own = candidates_of(workspace, editor, rest)
        candidates = LayerTrial(workspace, editor, tried, rest, stack).run(sets, own, ctx)
        layers = best_of(candidates).layers
        note = f"layer {', '.join(map(str, layers))} did best in a trial with {len(tried)} of these edits"
        note += "" if workspace.read_only else "; it is remembered for this method and model"
    value = layers[0] if name == "layer" else layers
    return LayerChoice(rest | {name: value}, note, layers, candidates)


def remember_choice(
    workspace: Workspace, editor: Editor[Any], choice: LayerChoice, ctx: RequestContext
) -> None:
    """Keep the layers that a trial found, for the next `layer="auto"` of this method."""
    if choice.candidates:
        table = [candidate.model_dump() for candidate in choice.candidates]
        remember_layers(workspace, editor.name, list(choice.layers), table, ctx)
