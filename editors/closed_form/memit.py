"""MEMIT: many facts as one change of a few MLPs (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from editors.closed_form.batch import BatchEditor, BatchParams
from editors.closed_form.moments import Statistics
from editors.closed_form.solve import Inverse


class MemitParams(BatchParams):
    """Parameters of MEMIT."""

    weight: float = Field(
        0.05,
        ge=0,
        le=1e4,
        description="lambda: how much typical keys weigh against the edits', in units of the number of inputs of the "
        "MLP's output projection; 0 maps every key exactly.",
    )


class Memit(BatchEditor[MemitParams]):
    """X = (lambda C + Kp Kp^T + K K^T)^-1 K (eq. 14)."""

    name = "memit"
    title = "Mass-editing memory in a transformer"
    description = (
        "Writes a batch of facts at once: finds a target value for each and solves one least-squares problem per "
        "layer that maps all their keys to them while typical keys, and those of earlier edits, move little."
    )
    source = "Meng et al., ICLR 2023, arXiv 2210.07229"
    when = "Several facts in one call, up to a thousand; each of them can still be reverted alone."
    cost = "About a second of CPU per fact on a model of 135M parameters, less in larger batches."
    params = MemitParams

    def inverse(self, statistics: Statistics, layer: int, params: MemitParams) -> Inverse:
        return statistics.metric(layer, params.ridge, params.sample)

    def weights(self, keys: Tensor, solved: Tensor, params: MemitParams) -> tuple[float, float]:
        weight = params.weight * keys.shape[1]
        return weight, max(weight, 1e-6 * float((keys * solved).sum(1).mean()))
