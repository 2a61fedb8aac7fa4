"""Several facts of one subject in one call: they share a key, so one value must serve all of them.

Their values are searched for one after another, each on top of those before it, whose facts are held. The key gets
the sum. A fact that is reverted takes its own part of the sum away, and the others' stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from editors.closed_form.material_rows import affordable, other_relations
from editors.closed_form.value_params import ValueParams
from editors.closed_form.values import TargetValues, find_values
from editors.constants import assumed
from editors.edit import Edit
from editors.forms.form import Hold, Material
from editors.metric import Inverse
from editors.model.lm import LM

SAME_KEY = assumed(
    0.9,
    "cosine under the metric above which an earlier edit's key counts as the new edit's own and is not held still",
    "a key cannot be moved and held still; what the earlier edit says is then held by the value",
)


def subject_groups(edits: Sequence[Edit]) -> list[int]:
    """For each edit the index of the first edit of its subject."""
    first: dict[str, int] = {}
    return [first.setdefault(" ".join(edit.subject.casefold().split()), i) for i, edit in enumerate(edits)]


def prepared(edits: Sequence[Edit], materials: Sequence[Material], later: bool = False) -> list[Material]:
    """What each edit is made from: its material, the facts of its subject that stand before it in the call, and the
    subject's other relations. Nothing where there is no material and no other fact of the subject.

    With `later` the facts of its subject that stand after it in the call are held too.
    """
    groups = subject_groups(edits)
    own = affordable(edits, materials)
    found = []
    for i, (edit, material) in enumerate(zip(edits, own, strict=True)):
        known = (j for j in range(len(edits) if later else i) if j != i)
        before = [_hold(edits[j]) for j in known if groups[j] == groups[i]]
        edited = {own[j].relation for j in range(len(edits)) if groups[j] == groups[i]}
        more = other_relations(edit, material, edited)
        found.append(replace(material, held=(*before, *material.held, *more)))
    return found


def find_group_values(
    lm: LM,
    layer: int,
    edits: Sequence[Edit],
    params: ValueParams,
    step: Callable[[float], None],
    *,
    attention: bool = False,
    materials: Sequence[Material] = (),
    reads: Tensor | None = None,
) -> TargetValues:
    """`find_values`, the facts of one subject one after another; `materials` are those of `prepared`."""
    groups = subject_groups(edits)
    rounds = [groups[:i].count(group) for i, group in enumerate(groups)]
    found: list[TargetValues] = []
    order: list[int] = []
    before: dict[int, Tensor] = {}  # by group: the sum of the deltas found so far
    for turn in range(max(rounds) + 1):
        chosen = [i for i, r in enumerate(rounds) if r == turn]

        def part(fraction: float, done: int = len(order), size: int = len(chosen)) -> None:
            step((done + size * fraction) / len(edits))

        values = find_values(
            lm,
            layer,
            [edits[i] for i in chosen],
            params,
            part,
            attention=attention,
            materials=[materials[i] for i in chosen] if materials else (),
            reads=None if reads is None else reads[chosen],
            before=torch.stack([before[groups[i]] for i in chosen]) if turn else None,
        )
        for i, delta in zip(chosen, values.deltas, strict=True):
            before[groups[i]] = before.get(groups[i], torch.zeros_like(delta)) + delta
        order += chosen
        found.append(values)
    back = sorted(range(len(order)), key=lambda j: order[j])
    names = ("keys", "values", "deltas", "probabilities", "steps")
    return TargetValues(**{n: torch.cat([getattr(v, n) for v in found])[back] for n in names})


def others_keys(earlier: Tensor | None, keys: Tensor, inverse: Inverse) -> Tensor | None:
    """The keys of earlier edits (p, d_in) without those that are nearly one of the new edits' `keys` (n, d_in)."""
    if earlier is None or not len(earlier) or not len(keys):
        return earlier
    solved = inverse.solve(keys.t().contiguous()).double()  # (d_in, n)
    mine = (keys.double() * solved.t()).sum(1).clamp(min=1e-30).sqrt()
    theirs = (earlier.double() * inverse.solve(earlier.t().contiguous()).double().t()).sum(1)
    cosine = (earlier.double() @ solved) / mine / theirs.clamp(min=1e-30).sqrt()[:, None]
    kept = earlier[cosine.max(1).values < SAME_KEY]
    return kept if len(kept) else None


def _hold(edit: Edit) -> Hold:
    return Hold(edit.text, edit.target, edit.span, "ledger")
