"""Write one fact into one layer: find its target value and map the subject's keys to it (ROME, and WISE's memory)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from editors.closed_form.keys import held_rows, read_keys, subject_rows
from editors.closed_form.material_rows import NOTHING
from editors.closed_form.one_subject import others_keys
from editors.closed_form.solve import direction
from editors.closed_form.value_params import ValueParams
from editors.closed_form.values import TargetValues, find_values
from editors.constants import DEFAULT_MODEL, assumed, tuned
from editors.edit import Edit
from editors.forms.form import Material
from editors.metric import Inverse
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import cpu_float

SLACK = tuned(
    0.03,
    "how loosely a subject's keys in several contexts are mapped to its value, in units of their mean square",
    models=DEFAULT_MODEL,
    command="python -m benchmarks.constants editors.closed_form.write_one.SLACK --values 0.003 0.3 -n 8",
    figure="makes no difference between 0.003 and 0.3: reworded .71, chat .88, neighbours 1.0, the subject's other "
    "facts .64, perplexity x1.030 (x1.028 at 0.3); not 0, for the keys of one subject are nearly collinear",
)
HOLDING_SLACK = assumed(
    0.3,
    "the same where keys of the subject's other facts are held still",
    "looser moves other texts less and holds less: with 24 and 34 facts of the default model neighbours .96 and "
    "perplexity x1.012 at 0.3, .80 and x1.08 at 0.03, with one fact in thirty less reworded (script not kept)",
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
    material: Material = NOTHING,
) -> WrittenFact:
    """delta = (v* - W k) x^T with x^T k = 1 (nearly, by SLACK) for the subject's key in each context.

    With `each` false their mean alone, exactly. `earlier` (p, d_in) are keys to hold still. `material` adds forms to
    learn and facts to hold; the value is then sought under the change that each token will get of it. Raises
    EditError when the search fails.
    """
    if not each:
        value = find_values(lm, layer, [edit], params, report)
        x = direction(keys := cpu_float(value.keys), metric, 0.0, earlier)
        return WrittenFact(_change(value, x), keys, value)
    keys = cpu_float(read_keys(lm, [layer], subject_rows(lm, edit, params, material))[layer])
    still = held_rows(lm, edit, params, material)
    held = cpu_float(read_keys(lm, [layer], still)[layer]) if still else None
    earlier = others_keys(earlier, keys, metric)
    x = direction(keys, metric, HOLDING_SLACK if still else SLACK, earlier, held)
    reads = None if material == NOTHING else x[None]
    value = find_values(lm, layer, [edit], params, report, materials=[material], reads=reads)
    return WrittenFact(_change(value, x), keys, value)


def _change(value: TargetValues, x: Tensor) -> LowRank:
    return LowRank(cpu_float(value.deltas[0])[:, None], x[None].float().contiguous())
