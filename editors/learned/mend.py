"""MEND as an editing method: a backward pass, the trained networks, a low-rank patch (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field

from editors.advice import Remedy
from editors.constants import assumed
from editors.edit import Edit
from editors.errors import EditError
from editors.learned.batches import TokenBatch, pair
from editors.learned.contrast import other_keys, with_other_keys
from editors.learned.factors import Factors, changed, gradient_factors, lowest_layer
from editors.learned.mend_training import FILE, TRAINING
from editors.learned.networks import Mend, WeightShape
from editors.method import EditContext, Editor, Params
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float
from editors.prompt_templates import with_other_subjects

CHUNK = 8  # edits in one backward pass
STRENGTHS = assumed(
    (1.0, 1.2, 1.45, 1.75, 2.1, 2.5),
    "factors of MEND's learned step sizes that are tried in turn until the model answers with the target",
    "the first is the strength that was trained; no comparison of values is known",
)


class MendParams(Params):
    """Parameters of an edit by MEND. Most of what matters was learned in training."""

    strength: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Multiplies the learned step sizes. None: 1, or up to 2.5 where 1 does not give the target.",
    )


class MendEditor(Editor[MendParams]):
    name = "mend"
    family = "learned"
    title = "Model editor networks with gradient decomposition"
    description = (
        "A trained network turns the gradient of one fact, token by token, into an edit of the last MLPs that also "
        "holds for other wordings and leaves neighbours alone. An edit is one backward pass."
    )
    source = "Mitchell et al., ICLR 2022, arXiv 2110.11309"
    when = "Many small edits at high speed, once train_editor has been run for this model; encoder-decoder models too."
    cost = "Minutes of training once; then some tenths of a second of CPU per fact on a model of 135M parameters."
    batch = True
    stronger = (Remedy("strength", "makes the edit stronger", factor=1.4, start=STRENGTHS[0]),)
    gentler = (Remedy("strength", "makes the edit weaker", factor=0.7, limit=0.1, start=STRENGTHS[0]),)
    params = MendParams
    training = TRAINING

    def needs(self, lm: LM, context: EditContext) -> list[str]:
        if context.trained is not None and (context.trained / FILE).is_file():
            return []
        return ['a trained editor for this model: call train_editor(method="mend") and wait for its job']

    def compute(self, lm: LM, edits: Sequence[Edit], params: MendParams, context: EditContext) -> Patch:
        """One low-rank change per edit and weight, joined; `info["ranks"]` holds each edit's rank, by weight.

        Raises NotReady when nothing has been trained for this model.
        """
        self.require(lm, context)
        assert context.trained is not None
        mend = trained(lm, context.trained / FILE)
        parts: dict[str, list[LowRank]] = {name: [] for name in mend.parameters_edited}
        for at in range(0, len(edits), CHUNK):
            chunk = edits[at : at + CHUNK]
            for i, edit in enumerate(chunk):
                context.report((at + 0.5 * i) / len(edits), f"gradient for {edit.subject}")
            for name, changes in _updates(lm, mend, chunk, params.strength).items():
                parts[name] += changes
            for i, edit in enumerate(chunk):
                context.report((at + 0.5 * (len(chunk) + i)) / len(edits), edit.subject)
        deltas: dict[str, Delta] = {name: _joined(changes) for name, changes in parts.items()}
        ranks = {name: [d.right.shape[0] for d in changes] for name, changes in parts.items()}
        return WeightPatch(deltas, info={"ranks": ranks})

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The patch without the other edits' columns. Edits do not depend on each other."""
        assert isinstance(patch, WeightPatch)
        deltas: dict[str, Delta] = {}
        ranks: dict[str, list[int]] = {}
        for name, delta in patch.deltas.items():
            assert isinstance(delta, LowRank)
            sizes: list[int] = patch.info["ranks"][name]
            lefts, rights = delta.left.split(sizes, dim=1), delta.right.split(sizes, dim=0)
            deltas[name] = _joined([LowRank(lefts[r], rights[r]) for r in rows])
            ranks[name] = [sizes[r] for r in rows]
        return WeightPatch(deltas, extra=patch.extra, info={**patch.info, "ranks": ranks})


def trained(lm: LM, path: Path) -> Mend:
    """The trained networks, on the model's device. Raises EditError when the model's weights have other shapes."""
    mend = _loaded(path, path.stat().st_mtime_ns)
    for shape in mend.shapes:
        if shape != WeightShape(shape.name, *lm.shape(shape.name)):
            raise EditError(
                f"{path} was trained for another model ({shape.name} differs); call train_editor again"
            )
    return mend.to(lm.device)


@lru_cache(maxsize=2)
def _loaded(path: Path, changed_ns: int) -> Mend:
    """The networks of a file. `changed_ns`, its time of modification, makes a newer file be read again."""
    return Mend.load(path)[0]


def _updates(lm: LM, mend: Mend, edits: Sequence[Edit], strength: float | None) -> dict[str, list[LowRank]]:
    rows = [pair(lm, e.text, e.target) for e in edits]
    names = mend.parameters_edited
    prompts = [with_other_subjects(e.text, e.span, mend.contrast) if mend.contrast else [] for e in edits]
    if (layer := lowest_layer(lm, names)) is None:
        batch, others = TokenBatch(lm, rows, None), other_keys(lm, names, prompts, None)
    else:
        batch, others = with_other_keys(lm, names, rows, prompts, layer)
    factors, _ = gradient_factors(lm, names, batch)
    with torch.no_grad():
        changes = mend(factors, others if mend.contrast else None)
        strengths = _sufficient_strengths(lm, batch, changes) if strength is None else [strength] * len(edits)
    return {name: [low_rank(c, i, s) for i, s in enumerate(strengths)] for name, c in changes.items()}


def _sufficient_strengths(lm: LM, batch: TokenBatch, changes: Mapping[str, Factors]) -> list[float]:
    """For each edit, the first of STRENGTHS at which the model answers with the target; the first if none does."""
    strengths = torch.zeros(batch.rows, device=batch.answers.device)
    for strength in STRENGTHS:
        scaled = {name: Factors(c.inputs, strength * c.deltas) for name, c in changes.items()}
        with changed(lm, scaled, 1):
            wrong = (batch.greedy_ids(batch.states()) != batch.answers).float()
        succeeded = torch.zeros_like(strengths).index_add(0, batch.row, wrong) == 0
        strengths = torch.where((strengths == 0) & succeeded, strength, strengths)
        if bool((strengths > 0).all()):
            break
    return [s or STRENGTHS[0] for s in strengths.tolist()]


def low_rank(change: Factors, i: int, strength: float = 1.0) -> LowRank:
    """The change of edit i without padding: left (d_out, t), right (t, d_in)."""
    inside = change.deltas[i].abs().amax(-1) > 0
    left = strength * change.deltas[i][inside].t()
    return LowRank(cpu_float(left), cpu_float(change.inputs[i][inside]))


def _joined(parts: Sequence[LowRank]) -> LowRank:
    return LowRank(
        torch.cat([p.left for p in parts], dim=1).contiguous(),
        torch.cat([p.right for p in parts], dim=0).contiguous(),
    )
