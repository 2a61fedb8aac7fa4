"""What an edit may disturb: the known facts nearest to its key, and how their answers move.

A rank-one edit R u^T / (u^T k), u = C^-1 k, adds R * (u^T k') / (u^T k) at another key k'. That
fraction, the overlap, says how much of the edit another fact feels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editors.closed_form.shape import default_layer
from editors.edit import Edit
from editors.measure import CANARIES, answered_with, ask, short_answer
from editors.metric import Metric
from editors.model.activations import record
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch
from server.results import Nearby
from server.transaction.workspace import Workspace
from store import EditRecord

RIDGE = 1e-2
MOST, MOST_TEXTS = 8, 4  # edits and canary texts that are told
TOKENS = 6  # of an answer


@dataclass(frozen=True)
class Known:
    """A fact beside the edits, with its overlap and the model's answer before."""

    kind: str
    prompt: str
    edit_id: str | None
    overlap: float
    before: str = ""


def nearest(workspace: Workspace, edits: Sequence[Edit], patch: Patch, without: Sequence[str]) -> list[Known]:
    """The facts with the greatest overlap, answered by the model as it is now (before the patch is on).

    `without` are ids of edits that the new ones replace. Empty for an encoder-decoder model.
    """
    lm = workspace.lm
    if lm.is_seq2seq:
        return []
    layer = _layer_of(lm, patch)
    metric = Metric(None)
    if not workspace.statistics.missing([layer]):
        metric = workspace.statistics.metric(layer, RIDGE)
    with lm.unrouted():
        keys = torch.stack([_keys(lm, layer, e.text)[lm.edit_prompt(e)[1]] for e in edits])  # (n, d_in)
        u = metric.solve(keys.t()).t()  # (n, d_in)
        scale = (u * keys).sum(1)  # (n,) u^T k
        active = workspace.ledger.active_edits(workspace.model_id) if workspace.model_id is not None else []
        found = [_edit_overlap(lm, layer, r, u, scale) for r in active if r.id not in without]
        found += [_canary_overlap(lm, layer, text, u, scale) for text in CANARIES]
    asked = {e.text for e in edits}
    ranked = sorted((k for k in found if k.prompt not in asked), key=lambda k: -abs(k.overlap))
    own, texts = ([k for k in ranked if k.kind == kind] for kind in ("edit", "canary"))
    near = sorted([*own[:MOST], *texts[:MOST_TEXTS]], key=lambda k: -abs(k.overlap))
    answers = ask(lm, [k.prompt for k in near], TOKENS)
    return [replace(k, before=answers[k.prompt]) for k in near]


def moved(workspace: Workspace, known: Sequence[Known]) -> list[Nearby]:
    """The same facts, answered by the model as it is now (with the patch on)."""
    answers = ask(workspace.lm, [k.prompt for k in known], TOKENS) if known else {}
    found = []
    for k in known:
        after = answers[k.prompt]
        was = short_answer(k.before)
        same = answered_with(k.prompt, after, was) if was else short_answer(after) == was
        found.append(
            Nearby(
                kind="edit" if k.kind == "edit" else "canary",
                edit_id=k.edit_id,
                prompt=k.prompt,
                overlap=k.overlap,
                before=k.before,
                after=after,
                moved=not same,
            )
        )
    return found


def _layer_of(lm: LM, patch: Patch) -> int:
    """The last layer whose MLP the patch changes; where one-layer methods edit, if it changes none."""
    names = patch.deltas if isinstance(patch, WeightPatch) else ()
    layers = [int(m.group(1)) for name in names if (m := re.search(r"\.(\d+)\.", name)) and _is_mlp(lm, name)]
    return max(layers, default=default_layer(lm))


def _is_mlp(lm: LM, name: str) -> bool:
    return name.removesuffix(".weight").endswith(lm.arch.mlp_out)


@torch.no_grad()
def _keys(lm: LM, layer: int, text: str, chat: bool | None = None) -> Tensor:
    """Keys (tokens, d_in) of a prompt at a layer's MLP."""
    ids = torch.tensor([lm.encode(lm.prompt(text, chat))[0]], device=lm.device)
    with record({0: lm.module(lm.mlp_out(layer))}, inputs=True, stop=True) as seen:
        lm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen[0].reshape(ids.shape[1], -1).float().cpu()


def _edit_overlap(lm: LM, layer: int, record_: EditRecord, u: Tensor, scale: Tensor) -> Known:
    """An active edit of the ledger, at its subject's last token."""
    edit = Edit(subject=record_.subject, prompt=record_.prompt, target=record_.target)
    key = _keys(lm, layer, edit.text)[lm.edit_prompt(edit)[1]]
    return Known("edit", edit.text, record_.id, _strongest(key[None], u, scale)[1])


def _canary_overlap(lm: LM, layer: int, text: str, u: Tensor, scale: Tensor) -> Known:
    """A canary text up to the token that feels the edit most; its first token, an attention sink, left out."""
    keys = _keys(lm, layer, text, chat=False)
    position, overlap = _strongest(keys[1:], u, scale)
    _, offsets = lm.encode(lm.prompt(text, chat=False))
    return Known("canary", text[: offsets[position + 1][1]], None, overlap)


def _strongest(keys: Tensor, u: Tensor, scale: Tensor) -> tuple[int, float]:
    """The position whose key feels one of the edits most, and how much."""
    felt = (keys @ u.t()) / scale  # (tokens, n)
    flat = int(felt.abs().argmax())
    return flat // felt.shape[1], float(felt.flatten()[flat])
