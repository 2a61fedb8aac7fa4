"""Which known facts lie near an edit, and how their answers change.

A rank-one edit R u^T / (u^T k) with u = C^-1 k changes the MLP's output at another key k' by R (u^T k') / (u^T k).
That factor is the overlap of the two keys: the share of the edit's change that the other fact gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from editors.canaries import CANARIES
from editors.closed_form.defaults import default_layer
from editors.edit import Edit
from editors.measure import ask
from editors.metric import RIDGE, Metric
from editors.model.activations import record
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch
from editors.scoring import same_fact
from server.facts.results import Nearby
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord

MOST_EDITS, MOST_TEXTS = 8, 4  # edits and canary texts in a report
ANSWER_TOKENS = 6


@dataclass(frozen=True)
class NearFact:
    """A known fact, its overlap with the edits, and the model's answer before them."""

    kind: Literal["edit", "canary"]
    prompt: str
    edit_id: str | None
    overlap: float
    before: str = ""


def nearest_facts(
    workspace: Workspace, edits: Sequence[Edit], patch: Patch, replaced: Sequence[EditRecord]
) -> list[NearFact]:
    """The active edits and canary texts with the greatest overlap, nearest first.

    Call it before the patch is on: the model answers them as it is now. `replaced`: active edits that the new
    ones retire; they are left out. An encoder-decoder model gives an empty list.
    """
    lm = workspace.lm
    if lm.is_seq2seq:
        return []
    layer = _edited_layer(lm, patch)
    metric = Metric(None)
    if not workspace.statistics.missing([layer]):
        metric = workspace.statistics.metric(layer, RIDGE)
    gone, prompts = {old.id for old in replaced}, {edit.text for edit in edits}
    others = [r for r in fact_edits(workspace.active_edits) if r.id not in gone and r.prompt not in prompts]
    with lm.unrouted():
        keys = torch.stack([_keys(lm, layer, e.text)[lm.edit_prompt(e)[1]] for e in edits])  # (n, d_in)
        solved = metric.solve(keys.t()).t()  # (n, d_in) u
        scale = (solved * keys).sum(1)  # (n,) u^T k
        near = [_overlap_of_edit(lm, layer, r, solved, scale) for r in others]
        texts = [_overlap_of_text(lm, layer, text, solved, scale) for text in CANARIES]
    nearest = _by_overlap([*_by_overlap(near)[:MOST_EDITS], *_by_overlap(texts)[:MOST_TEXTS]])
    answers = ask(lm, [fact.prompt for fact in nearest], ANSWER_TOKENS)
    return [replace(fact, before=answers[fact.prompt]) for fact in nearest]


def answers_now(workspace: Workspace, facts: Sequence[NearFact]) -> list[Nearby]:
    """The same facts with the answers of the model as it is now, that is with the patch on."""
    answers = ask(workspace.lm, [fact.prompt for fact in facts], ANSWER_TOKENS) if facts else {}
    results = []
    for fact in facts:
        after = answers[fact.prompt]
        results.append(
            Nearby(
                kind=fact.kind,
                edit_id=fact.edit_id,
                prompt=fact.prompt,
                overlap=fact.overlap,
                before=fact.before,
                after=after,
                moved=not same_fact(fact.prompt, fact.before, after),
            )
        )
    return results


def _by_overlap(facts: Sequence[NearFact]) -> list[NearFact]:
    return sorted(facts, key=lambda fact: -abs(fact.overlap))


def _edited_layer(lm: LM, patch: Patch) -> int:
    """The last layer whose MLP output the patch changes; if it changes none, the layer that one-layer methods edit."""
    names = patch.deltas if isinstance(patch, WeightPatch) else ()
    layers = [i for i in range(lm.n_layers) if lm.mlp_out(i) in names]
    return max(layers, default=default_layer(lm))


@torch.no_grad()
def _keys(lm: LM, layer: int, text: str, chat: bool | None = None) -> Tensor:
    """Keys (tokens, d_in) of a prompt at a layer's MLP output projection, float32 on the CPU."""
    ids = torch.tensor([lm.encode(lm.prompt(text, chat))[0]], device=lm.device)
    with record({0: lm.module(lm.mlp_out(layer))}, inputs=True, stop=True) as seen:
        lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen[0].reshape(ids.shape[1], -1).float().cpu()


def _overlap_of_edit(lm: LM, layer: int, other: EditRecord, solved: Tensor, scale: Tensor) -> NearFact:
    """An active edit, at its subject's last token."""
    edit = Edit(subject=other.subject, prompt=other.prompt, target=other.target)
    key = _keys(lm, layer, edit.text)[lm.edit_prompt(edit)[1]]
    return NearFact("edit", edit.text, other.id, _strongest(key[None], solved, scale)[1])


def _overlap_of_text(lm: LM, layer: int, text: str, solved: Tensor, scale: Tensor) -> NearFact:
    """A canary text, cut after the token with the greatest overlap.

    The first token is left out: it is an attention sink with a key of its own kind.
    """
    keys = _keys(lm, layer, text, chat=False)
    position, overlap = _strongest(keys[1:], solved, scale)
    _, offsets = lm.encode(lm.prompt(text, chat=False))
    return NearFact("canary", text[: offsets[position + 1][1]], None, overlap)


def _strongest(keys: Tensor, solved: Tensor, scale: Tensor) -> tuple[int, float]:
    """The position whose key has the greatest overlap with one of the edits, and that overlap."""
    overlaps = (keys @ solved.t()) / scale  # (tokens, n)
    flat = int(overlaps.abs().argmax())
    return flat // overlaps.shape[1], float(overlaps.flatten()[flat])
