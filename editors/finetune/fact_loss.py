"""What fine-tuning minimises: the target's negative log-likelihood, and how far other predictions move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.finetune.examples import Example
from editors.model.lm import END, LM


class FactLoss:
    """The loss over predictions of target rows and of preserved rows (one for each counted column of each row)."""

    def __init__(self, lm: LM, rows: Sequence[Example]) -> None:
        device = lm.device
        self.answer_logprobs = lm.answer_logprobs

        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)

        targets = [r for r in rows if r.answer]
        preserved = [r for r in rows if not r.answer]
        self.answer = torch.tensor([t for r in targets for t in r.answer], device=device)
        self.own = tensor([float(r.own) for r in targets for _ in r.answer]).bool()
        # Every row has the same weight, however many tokens it has.
        self.target_weights = tensor([1 / len(r.answer) / len(targets) for r in targets for _ in r.answer])
        self.preserved_weights = tensor(
            [1 / len(r.columns) / len(preserved) for r in preserved for _ in r.columns]
        )
        self.base_logp: Tensor | None = None  # (preserved columns, vocabulary), before training

    def of_targets(self, logp: Tensor) -> Tensor:
        """Negative log-likelihood of the targets; `logp` (target columns, vocabulary)."""
        return -(self._answer_logp(logp) * self.target_weights).sum()

    def of_preserved(self, logp: Tensor) -> Tensor:
        """KL(before || after) at the preserved columns; `logp` (preserved columns, vocabulary)."""
        assert self.base_logp is not None
        kl = (self.base_logp.exp() * (self.base_logp - logp)).sum(-1)
        return (kl * self.preserved_weights).sum()

    def _answer_logp(self, logp: Tensor) -> Tensor:
        """Log-probability of each answer token; of END, that the next token does not continue the word."""
        return self.answer_logprobs(logp, self.answer)

    @torch.no_grad()
    def is_learned(self, logp: Tensor, probability: float) -> bool:
        """Every target row is answered greedily, and the mean and the edit's own prompt reach `probability`."""
        p = self._answer_logp(logp).exp()
        tokens = self.answer != END
        greedy = bool((logp[tokens].argmax(-1) == self.answer[tokens]).all())
        mean = float((p * self.target_weights).sum())
        return bool(greedy and mean >= probability and float(p[self.own].min()) >= probability)
