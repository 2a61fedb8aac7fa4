"""The keys of earlier edits, read from the patches that are active now.

A reverted edit is not among them, so it constrains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editors.method import Prior
from editors.patch import Patch


def prior_keys(prior: Sequence[Prior], parameter: str) -> Tensor | None:
    """Keys (p, d_in) of the active edits at one weight, oldest first; None when there are none.

    Every closed-form patch keeps its keys under `<parameter>:keys`; a patch of some of a batch's
    rows holds those rows' only.
    """
    keys = [p.patch.extra[f"{parameter}:keys"] for p in prior if f"{parameter}:keys" in p.patch.extra]
    return torch.cat(keys).float() if keys else None


def facts_written(prior: Sequence[Prior]) -> int:
    """How many facts the active closed-form edits have written."""
    return sum(len(p.patch.extra["counts"]) for p in prior if "counts" in p.patch.extra)


def rows_of(patch: Patch, rows: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`extra` and `info` of a closed-form patch, for some of its facts.

    `counts` (n,) is the number of keys of each fact. Tensors under `...:keys`, `...:solved` and `...:gradients`
    hold the keys of all facts one after another, `moved` says which of them the edit moves, and tensors under
    `...:residuals` have one row per fact, as have `group`, equal for the facts of one subject, and `ranks`, the columns
    of each fact where it has several.
    """
    counts = patch.extra["counts"].tolist()
    starts = [sum(counts[:i]) for i in range(len(counts))]
    facts = torch.tensor(list(rows))
    keys = torch.tensor([j for r in rows for j in range(starts[r], starts[r] + counts[r])])
    extra: dict[str, Tensor] = {}
    for name, tensor in patch.extra.items():
        if name == "moved" or name.endswith((":keys", ":solved", ":gradients")):
            tensor = tensor[keys]
        elif name in ("counts", "group", "ranks") or name.endswith(":residuals"):
            tensor = tensor[facts]
        extra[name] = tensor.contiguous()
    per_fact = {
        name: [patch.info[name][r] for r in rows] for name in ("steps", "probabilities") if name in patch.info
    }
    return extra, {**patch.info, **per_fact}
