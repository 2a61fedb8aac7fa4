"""AlphaEdit: changes only directions that typical keys do not use (Fang et al., ICLR 2025, arXiv 2410.02355)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from editors.closed_form.batch import BatchEditor
from editors.closed_form.batch_params import BatchParams
from editors.constants import assumed
from editors.metric import Inverse
from editors.moments import Statistics


class AlphaEditParams(BatchParams):
    """Parameters of AlphaEdit."""

    energy: float = Field(
        assumed(0.5, "share of the keys' energy in the null space"),
        gt=0,
        lt=1,
        description="The null space: the directions of the second moment that together carry this share of the keys' "
        "energy. Smaller disturbs less and can say less.",
    )
    l2: float = Field(
        assumed(0.1, "lambda, in units of the projected keys' mean square"),
        gt=0,
        le=1e4,
        description="lambda: in units of the mean square of the projected keys.",
    )


class AlphaEdit(BatchEditor[AlphaEditParams]):
    """X = (P (K K^T + Kp Kp^T) + lambda I)^-1 P K (eq. 12)."""

    name = "alphaedit"
    title = "Null-space constrained editing"
    description = (
        "Projects the change onto the directions that typical keys hardly use, and holds the keys of all active "
        "earlier edits still, so that many edits one after another disturb neither the model nor each other. A "
        "reverted edit stops constraining later ones."
    )
    source = "Fang et al., ICLR 2025, arXiv 2410.02355"
    when = "A long sequence of edits, one or a few at a time."
    cost = "As memit, and once per layer the spectrum of the second moment (seconds)."
    params = AlphaEditParams
    span = 4

    def inverse(self, statistics: Statistics, layer: int, params: AlphaEditParams) -> Inverse:
        return statistics.projector(layer, params.energy, params.sample)

    def weights(self, keys: Tensor, solved: Tensor, params: AlphaEditParams) -> tuple[float, float]:
        weight = params.l2 * float((keys.double() * solved.double()).sum(1).mean())
        return weight, weight
