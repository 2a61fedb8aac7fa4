"""Write one fact into one layer: find its target value and map the subject's keys to it (ROME, and WISE's memory)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from editors.closed_form.keys import read_keys, subject_rows
from editors.closed_form.solve import rank_one
from editors.closed_form.values import TargetValues, ValueParams, find_values
from editors.constants import assumed
from editors.edit import Edit
from editors.metric import Inverse
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import cpu_float

SLACK = assumed(
    0.03,
    "how loosely a subject's keys in several contexts are mapped to its value, in units of their mean square",
    "the keys of one subject are nearly collinear, so that an exact solution is badly conditioned",
)


@dataclass(frozen=True)
class WrittenFact:
    """A fact that was written: the rank-one change, its keys (contexts, d_in), and the target value that was found."""

    change: LowRank
    keys: Tensor
    value: TargetValues


def write(
    lm: LM,
    layer: int,
    edit: Edit,
    params: ValueParams,
    metric: Inverse,
    report: Callable[[float], None],
    *,
    each: bool = True,
    earlier: Tensor | None = None,
) -> WrittenFact:
    """delta = (v* - W k) x^T with x^T k = 1 (nearly, by SLACK) for the subject's key in each context.

    With `each` false their mean alone, exactly. `earlier` (p, d_in) are keys to hold still. Raises EditError when
    the search fails.
    """
    value = find_values(lm, layer, [edit], params, report)
    keys = value.keys
    if each:
        keys = read_keys(lm, [layer], subject_rows(lm, edit, params))[layer]
    keys = cpu_float(keys)
    change = rank_one(cpu_float(value.deltas[0]), keys, metric, SLACK if each else 0.0, earlier)
    return WrittenFact(change, keys, value)
