"""EMMET and R-ROME: facts as equality constraints (Gupta et al., 2024, arXiv 2403.14236 and 2403.07175)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from editors.closed_form.batch import BatchEditor
from editors.closed_form.batch_params import BatchParams
from editors.closed_form.write_one import SLACK
from editors.metric import Inverse
from editors.moments import Statistics


class EmmetParams(BatchParams):
    """Parameters of EMMET and R-ROME."""

    slack: float = Field(
        SLACK,
        ge=0,
        le=10,
        description="How loosely keys are constrained, in units of their mean square under the second moment: the keys "
        "of one subject in several contexts, or in several facts, are nearly collinear. 0: exactly.",
    )


class Emmet(BatchEditor[EmmetParams]):
    """X = C^-1 K (K^T C^-1 K)^-1: every key is mapped to its value, typical keys move least (eq. 9)."""

    name = "emmet"
    title = "Equality-constrained mass model editing"
    description = (
        "Writes a batch of facts at once, mapping the key of every one to its value as an equality instead of in the "
        "least-squares sense; with one fact it is ROME."
    )
    source = "Gupta et al., EMNLP Findings 2024, arXiv 2403.14236"
    when = "A small batch of facts about different subjects that must all hold exactly."
    cost = "As memit."
    params = EmmetParams

    def inverse(self, statistics: Statistics, layer: int, params: EmmetParams) -> Inverse:
        return statistics.metric(layer, params.ridge, params.sample)

    def weights(self, keys: Tensor, solved: Tensor, params: EmmetParams) -> tuple[float, float]:
        square = float((keys.double() * solved.double()).sum(1).mean())
        return params.slack * square, max(params.slack, 1e-6) * square


class RRome(Emmet):
    """EMMET for one fact after another, on one layer: ROME with the same keys on both sides."""

    name = "r_rome"
    title = "Rebuilt rank-one model editing"
    description = (
        "ROME as its equation has it: the same keys, those of the subject in every context, stand on both sides, which "
        "keeps long sequences of single edits from breaking the model; earlier edits' keys are held still."
    )
    source = "Gupta et al., 2024, arXiv 2403.07175"
    when = "Single corrections, many of them over time."
    cost = "As rome."
