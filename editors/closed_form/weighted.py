"""The weighted least squares that MEMIT and PMET share: lambda C against the edits' own keys."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from editors.closed_form.batch import BatchEditor
from editors.closed_form.batch_params import BatchParams
from editors.constants import assumed
from editors.metric import Inverse
from editors.moments import Statistics


class MemitParams(BatchParams):
    """Parameters of MEMIT."""

    weight: float = Field(
        assumed(
            0.2,
            "lambda: typical keys against the edits', per input",
            "the code of MEMIT takes 15,000 for GPT-J's 16,384 inputs, so 0.9 per input; no comparison is known",
        ),
        ge=0,
        le=1e4,
        description="lambda: how much typical keys weigh against the edits', in units of the number of inputs of the "
        "MLP's output projection; 0 maps every key exactly.",
    )


class WeightedEditor(BatchEditor[MemitParams]):
    """X = (lambda C + Kp Kp^T + K K^T)^-1 K (MEMIT, eq. 14)."""

    params = MemitParams
    span = 4

    def inverse(self, statistics: Statistics, layer: int, params: MemitParams) -> Inverse:
        return statistics.metric(layer, params.ridge, params.sample)

    def weights(self, keys: Tensor, solved: Tensor, params: MemitParams) -> tuple[float, float]:
        weight = params.weight * keys.shape[1]
        return weight, max(weight, 1e-6 * float((keys * solved).sum(1).mean()))
