"""A direction in the inputs of an MLP that tells the places where a fact is asked from all others.

Transformer-Patcher (Huang et al., ICLR 2023, arXiv 2301.09785) trains the key of a new neuron with two losses: its
activation loss makes it active where the edit applies, its memory loss silent on a memory of other inputs. Here the
same is asked of a linear function without a bias. It is fitted to many wordings at once, in the metric of ordinary
text, and has one best solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import assumed

MARGIN = 1.0
"""What a detector says at least where its fact is asked; elsewhere it says at most -MARGIN."""
STEEPNESS = assumed(
    2.0, "how fast the loss falls beyond the margin, per unit", "no comparison is known; any value near it"
)
ORDINARY_WEIGHT = assumed(
    4.0,
    "weight of ordinary text beside the held texts and the moved ones, which have 1 each",
    "what fires in ordinary text harms everything that the model says; no comparison is known",
)
DECAY = assumed(
    1e-3,
    "weight of the detector's mean square on ordinary text",
    "it only decides between solutions that separate the texts alike; no comparison is known",
)
RIDGE = assumed(1e-3, "added to the second moment of the inputs, in units of its mean diagonal")
MOST_STEPS = 150


@dataclass(frozen=True)
class OrdinarySpace:
    """Inputs of an MLP on ordinary text, in coordinates in which their second moment is the identity."""

    whitened: Tensor  # (tokens, d)
    to_whitened: Tensor  # (d, d): an input times this is whitened
    one: Tensor  # (d,): an input times this is nearly 1 on all text, and so takes the place of a bias

    @classmethod
    def of(cls, inputs: Tensor) -> OrdinarySpace:
        """The space of inputs (tokens, d)."""
        precise = inputs.double()
        moment = precise.t() @ precise / len(precise)
        moment.diagonal().add_(RIDGE * float(moment.diagonal().mean()))
        identity = torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment)
        to_whitened = torch.linalg.solve_triangular(root, identity, upper=False).t()
        one = to_whitened @ (to_whitened.t() @ precise.mean(0))
        one = one / (precise.mean(0) @ one)
        return cls((precise @ to_whitened).float(), to_whitened.float(), one.float())

    def detector(self, moved: Tensor, held: Tensor) -> Tensor:
        """The direction (d,) that is MARGIN or more on `moved` (n, d), and -MARGIN or less on `held` and ordinary text.

        Where that cannot be, as near to it as a logistic loss comes.
        """
        groups = ((moved, 1.0, 1.0), (held, -1.0, 1.0), (None, -1.0, ORDINARY_WEIGHT))
        rows = [
            (self.whitened if inputs is None else inputs @ self.to_whitened, sign, weight)
            for inputs, sign, weight in groups
            if inputs is None or len(inputs)
        ]
        found = torch.zeros(len(self.one), requires_grad=True)
        optimiser = torch.optim.LBFGS([found], max_iter=MOST_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            missed = DECAY * found.square().sum()
            for whitened, sign, weight in rows:
                short = STEEPNESS * (MARGIN - sign * (whitened @ found))
                missed = missed + weight * torch.nn.functional.softplus(short).mean()
            missed.backward()
            return missed

        with torch.enable_grad():
            optimiser.step(loss)
        return self.to_whitened @ found.detach()
