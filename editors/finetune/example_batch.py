"""A batch of training examples, run from the first trained layer on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from editors.finetune.examples import Example
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM
from editors.model.precision import head_copy, search_dtype
from editors.model.upper_layers import UpperLayers


class ExampleBatch:
    """Calling it gives the predictions of all rows at the columns that count.

    They are differentiable with respect to the layers from `first_layer` on. The layers below run once and
    must not change between two calls. With `rough_above`, the layers above that one, and the head, run in bfloat16
    where the processor is faster for it; they must not change either. `exact` runs them in the model's own precision.
    """

    def __init__(
        self, lm: LM, first_layer: int, rows: Sequence[Example], rough_above: int | None = None
    ) -> None:
        self.lm = lm
        self.rows = torch.tensor([i for i, r in enumerate(rows) for _ in r.columns], device=lm.device)
        self.columns = torch.tensor([c for r in rows for c in r.columns], device=lm.device)
        inputs = answer_inputs(lm, [(r.prompt, r.answer_input) for r in rows])
        self._width = inputs.width
        self.tokens = inputs.mask.bool()
        self._upper = UpperLayers(lm, first_layer)
        with self._upper.capturing(), torch.no_grad():
            lm.base_model(**inputs.call)
        self._last = lm.n_layers - 1 if rough_above is None else rough_above
        self._dtype = None if rough_above is None or lm.is_seq2seq else search_dtype(lm)
        self._rough = self._upper.lowered(self._last, self._dtype) if self._dtype else None

    @property
    def positions(self) -> Tensor:
        """Indices of the columns that count in the batch flattened to (rows * tokens)."""
        return self.rows * self._width + self.columns

    @property
    def is_rough(self) -> bool:
        """Whether a call runs some layers in a lower precision."""
        return self._rough is not None

    def __call__(self) -> Tensor:
        """Log-probabilities in float32: (columns that count, vocabulary), row after row."""
        if self._rough is None or self._dtype is None:
            return self.exact()
        hidden = self._upper.run(self._upper.input, end=self._last).to(self._dtype)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slow for a few short rows
            hidden = self._rough.run(hidden)
        return self._predicted(hidden, head_copy(self.lm, self._dtype))

    def exact(self) -> Tensor:
        """The same with all layers in the model's own precision."""
        return self._predicted(self._upper.run(self._upper.input))

    def _predicted(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        hidden = hidden.to(self.lm.device)
        return self.lm.head(hidden[self.rows, self.columns], head).float().log_softmax(-1)
