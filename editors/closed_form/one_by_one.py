"""What the methods share that write one fact after another, each as a rank-one change of one weight of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from editors.closed_form.prior_keys import rows_of
from editors.closed_form.values import TargetValues
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.patch import Patch, WeightPatch, with_training_of


def reporting(context: EditContext, i: int, n: int, subject: str) -> Callable[[float], None]:
    """Reports the progress of fact i of n."""
    return lambda fraction: context.report((i + fraction) / n, subject)


def joined(
    parameter: str, changes: Sequence[LowRank], keys: Sequence[Tensor], values: Sequence[TargetValues]
) -> WeightPatch:
    """One patch of the facts' changes, each of one column or several, with keys (contexts, d_in) and search results."""
    left = torch.cat([change.left for change in changes], dim=1)
    right = torch.cat([change.right for change in changes], dim=0)
    extra = {f"{parameter}:keys": torch.cat(list(keys)), "counts": torch.tensor([len(k) for k in keys])}
    ranks = [change.right.shape[0] for change in changes]
    if max(ranks) > 1:
        extra["ranks"] = torch.tensor(ranks)
    info: dict[str, Any] = {
        "steps": [int(value.steps[0]) for value in values],
        "probabilities": [round(float(value.probabilities[0]), 4) for value in values],
    }
    return WeightPatch({parameter: LowRank(left, right)}, extra=extra, info=info)


def columns(patch: Patch, rows: Sequence[int]) -> WeightPatch:
    """The patch of some facts: their columns, which do not depend on the others'."""
    assert isinstance(patch, WeightPatch)
    picks = list(rows)
    ranks = patch.extra["ranks"].tolist() if "ranks" in patch.extra else None
    deltas = {name: d.select(picks, ranks) for name, d in patch.deltas.items() if isinstance(d, LowRank)}
    extra, info = rows_of(patch, picks)
    return with_training_of(WeightPatch(deltas, extra=extra, info=info), patch, picks)
