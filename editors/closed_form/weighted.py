"""The weighted least squares that MEMIT and PMET share: lambda C against the edits' own keys."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from editors.closed_form.batch import BatchEditor
from editors.closed_form.batch_params import BatchParams
from editors.constants import TWO_MODELS, tuned
from editors.metric import Inverse
from editors.moments import Statistics


class MemitParams(BatchParams):
    """Parameters of MEMIT."""

    weight: float = Field(
        tuned(
            0.2,
            "lambda: typical keys against the edits', per input",
            models=TWO_MODELS,
            command="python -m benchmarks.constants editors.closed_form.weighted.MemitParams.weight --values 0.05 0.8 "
            "-n 10 --together --method memit",
            figure="a trade of other wordings for everything else: reworded / chat / neighbours / the subject's other "
            "facts, perplexity, first model: 0.2 .60 / .80 / .94 / .63, x1.180; 0.05 .63 / .90 / .94 / .59, x1.220; "
            "0.8 .50 / .70 / .96 / .67, x1.064; second: 0.2 .70 / .30 / .90 / .74, x1.051; 0.05 .73 / .30 / .88 / "
            ".70, x1.067; 0.8 .67 / .30 / .96 / .83, x1.013; the code of MEMIT takes 15,000 for GPT-J's 16,384 "
            "inputs, so 0.9",
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
