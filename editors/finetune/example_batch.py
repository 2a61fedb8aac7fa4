"""A batch of training examples, run from the first trained layer on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from editors.finetune.examples import Example
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM
from editors.model.precision import head_copy, search_dtype
from editors.model.suffixes import capture_suffixes
from editors.model.upper_layers import UpperLayers


class ExampleBatch:
    """Calling it gives the predictions of all rows at the columns that count.

    They are differentiable with respect to the layers from `first_layer` on. The layers below run once and
    must not change between two calls. With `rough_above`, the layers above that one, and the head, run in bfloat16
    where the processor is faster for it; they must not change either. `exact` runs them in the model's own precision,
    if `keep_exact`: else already the first pass, which prepares all others, is cheaper.
    With `starts`, one for each row, only the tokens from there on are run: nothing may change at those before.
    """

    def __init__(
        self,
        lm: LM,
        first_layer: int,
        rows: Sequence[Example],
        rough_above: int | None = None,
        starts: Sequence[int] | None = None,
        *,
        keep_exact: bool = True,
    ) -> None:
        self.lm = lm
        cut = [0] * len(rows) if starts is None else starts
        self.rows = torch.tensor([i for i, r in enumerate(rows) for _ in r.columns], device=lm.device)
        places = [c - start for r, start in zip(rows, cut, strict=True) for c in r.columns]
        self.columns = torch.tensor(places, device=lm.device)
        self._last = lm.n_layers - 1 if rough_above is None else rough_above
        self._dtype = None if rough_above is None or lm.is_seq2seq else search_dtype(lm)
        self._keep_exact = keep_exact or self._dtype is None
        self._upper = UpperLayers(
            lm, first_layer, dtype=None if self._keep_exact else self._dtype, above=self._last
        )
        with torch.no_grad(), nullcontext() if self._keep_exact else sdpa_kernel(SDPBackend.MATH):
            mask, last = self._captured(rows, starts)
            self._first_states = last.to(lm.device)[self.rows, self.columns]
        self.tokens = mask.bool()
        self._rough = self._upper
        if self._keep_exact and self._dtype:
            self._rough = self._upper.lowered(self._last, self._dtype)

    def _captured(self, rows: Sequence[Example], starts: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """The batch's mask (rows, tokens), and the last layer's output in the pass that prepares all others."""
        if starts is not None:
            ends = [((*r.prompt, *r.answer_input), start) for r, start in zip(rows, starts, strict=True)]
            captured = capture_suffixes(self._upper, ends, self._upper.first_layer)
            return captured.mask, captured.output
        inputs = answer_inputs(self.lm, [(r.prompt, r.answer_input) for r in rows])
        with self._upper.capturing():
            return inputs.mask, self._upper.forward(**inputs.call)

    @property
    def positions(self) -> Tensor:
        """Indices of the columns that count in the batch flattened to (rows * tokens)."""
        return self.rows * self.tokens.shape[1] + self.columns

    @property
    def is_rough(self) -> bool:
        """Whether a call runs some layers in a lower precision."""
        return self._dtype is not None

    @torch.no_grad()
    def at_first(self) -> Tensor:
        """The predictions of the first pass: exact ones if `keep_exact`, else as of a call then."""
        return self._log_probabilities(self._first_states, rough=not self._keep_exact)

    def __call__(self) -> Tensor:
        """Log-probabilities in float32: (columns that count, vocabulary), row after row."""
        if self._dtype is None:
            return self.exact()
        hidden = self._upper.run(self._upper.input, end=self._last).to(self._dtype)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slow for a few short rows
            hidden = self._rough.run(hidden, start=self._last + 1)
        return self._predicted(hidden, rough=True)

    def exact(self) -> Tensor:
        """The same with all layers in the model's own precision."""
        assert self._keep_exact, "this batch was made without keep_exact"
        return self._predicted(self._upper.run(self._upper.input), rough=False)

    def _predicted(self, hidden: Tensor, *, rough: bool) -> Tensor:
        return self._log_probabilities(hidden.to(self.lm.device)[self.rows, self.columns], rough=rough)

    def _log_probabilities(self, states: Tensor, *, rough: bool) -> Tensor:
        head = head_copy(self.lm, self._dtype) if rough and self._dtype else None
        return self.lm.head(states, head).float().log_softmax(-1)
