"""How far the whole model has drifted: its next-token distributions on fixed everyday texts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.model.answer_inputs import answer_inputs, columns_of, final_states, text_row
from editors.model.lm import LM

# Self-written everyday texts of several kinds; fixed, so that drift is comparable over time.
CANARIES = (
    "The sun rises in the east and sets in the west.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "She opened the window because the room was too warm.",
    "def add(a, b):\n    return a + b",
    "William Shakespeare wrote many plays, such as Romeo and Juliet.",
    "The capital of Norway is Oslo, and the capital of Chile is Santiago.",
    "Please send me the report before Friday afternoon.",
    "Three plus four equals seven.",
)


@dataclass(frozen=True)
class DriftResult:
    kl: float  # mean KL(pristine || live) per position, nats
    perplexity_before: float
    perplexity_after: float


class Canaries:
    """The pristine model's next-token distributions on the canary texts, recorded once."""

    def __init__(self, lm: LM) -> None:
        self._rows = [text_row(lm, lm.encode(lm.prompt(text, chat=False))[0]) for text in CANARIES]
        self._base, self._nll = self._distributions(lm)

    def drift(self, lm: LM) -> DriftResult:
        """Distance of the model as it is now from the recorded one."""
        now, nll = self._distributions(lm)
        base = self._base.float()
        kl = float((base.exp() * (base - now.float())).sum(-1).mean())
        return DriftResult(max(kl, 0.0), math.exp(self._nll), math.exp(nll))

    @torch.no_grad()
    def _distributions(self, lm: LM) -> tuple[Tensor, float]:
        """Log-probabilities (positions, vocabulary) in half precision, and mean negative log-likelihood."""
        inputs = answer_inputs(lm, self._rows)
        states = final_states(lm, inputs)[columns_of(inputs, inputs.lengths)]
        logp = lm.head(states).float().log_softmax(-1)
        answers = torch.tensor([token for _, answer in self._rows for token in answer], device=logp.device)
        return logp.half().cpu(), float(-logp.gather(1, answers[:, None]).mean())
