"""A batch of training examples, run from the first trained layer on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.finetune.examples import Example
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM
from editors.model.upper_layers import UpperLayers


class ExampleBatch:
    """Calling it gives the predictions of all rows at the columns that count.

    They are differentiable with respect to the layers from `first_layer` on. The layers below run once and
    must not change between two calls.
    """

    def __init__(self, lm: LM, first_layer: int, rows: Sequence[Example]) -> None:
        self.lm = lm
        self.rows = torch.tensor([i for i, r in enumerate(rows) for _ in r.columns], device=lm.device)
        self.columns = torch.tensor([c for r in rows for c in r.columns], device=lm.device)
        inputs = answer_inputs(lm, [(r.prompt, r.answer_input) for r in rows])
        self._width = inputs.width
        self.tokens = inputs.mask.bool()
        self._upper = UpperLayers(lm, first_layer)
        with self._upper.capturing(), torch.no_grad():
            lm.base_model(**inputs.call)

    @property
    def positions(self) -> Tensor:
        """Indices of the columns that count in the batch flattened to (rows * tokens)."""
        return self.rows * self._width + self.columns

    def __call__(self) -> Tensor:
        """Log-probabilities in float32: (columns that count, vocabulary), row after row."""
        hidden = self._upper.run(self._upper.input).to(self.lm.device)
        return self.lm.head(hidden[self.rows, self.columns]).float().log_softmax(-1)
