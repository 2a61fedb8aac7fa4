"""A padded batch of prompts with answers that is run many times under different edits.

For a decoder-only model the hidden states below the lowest edited layer cannot change: they are
computed once, without gradients. Only the layers from there on run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from editors.model.answer_inputs import answer_inputs, columns_of, final_states
from editors.model.lm import END, LM
from editors.model.upper_layers import UpperLayers

Pair = tuple[
    list[int], list[int]
]  # prompt ids, answer ids; END last if the answer's last word must end there


class TokenBatch:
    """Rows of (prompt, answer) token ids, and the predictions of their answer tokens.

    Args:
        rows: prompt and answer of each row.
        layer: the lowest layer that may be edited while the batch is used. With None, and for encoder-decoder models
            (whose encoder is edited too), the whole model is run every time.
        checkpointing: compute activations again in the backward pass (less memory).
    """

    def __init__(self, lm: LM, rows: Sequence[Pair], layer: int | None, checkpointing: bool = False) -> None:
        self.lm, self.layer, self.checkpointing = lm, layer, checkpointing
        self.lengths = [len(answer) for _, answer in rows]
        self.answers = torch.tensor([t for _, answer in rows for t in answer], device=lm.device)
        self.row = torch.tensor([i for i, n in enumerate(self.lengths) for _ in range(n)], device=lm.device)
        self._upper: UpperLayers | None = None
        self.inputs = answer_inputs(lm, [(prompt, answer[:-1]) for prompt, answer in rows])
        _, self.places = columns_of(self.inputs, self.lengths)
        if layer is not None and not lm.is_seq2seq:
            self._prepare(layer)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @torch.no_grad()
    def _prepare(self, layer: int) -> None:
        upper = UpperLayers(self.lm, layer, checkpointing=self.checkpointing)
        with upper.capturing():
            self.lm.base_model(**self.inputs.call)
        self._upper = upper

    def beginning(self, n: int) -> TokenBatch:
        """The batch with its first n rows only. Nothing is computed again."""
        part, index = copy(self), torch.arange(n, device=self.row.device)
        inside = self.row < n
        part.lengths, part.inputs = self.lengths[:n], self.inputs.beginning(n)
        part.answers, part.row, part.places = self.answers[inside], self.row[inside], self.places[inside]
        if self._upper is not None:
            part._upper = self._upper.rows(index, self.rows)
        return part

    def states(self) -> Tensor:
        """Hidden states (answer tokens, d_model) that predict the answer tokens."""
        return self._final().to(self.lm.device)[self.row, self.places]

    def read(self, states: Tensor) -> Tensor:
        """Logits in float32 of all or some of the states."""
        return self.lm.head(states).float()

    def logits(self) -> Tensor:
        """Logits (answer tokens, vocabulary) in float32, row after row."""
        return self.read(self.states())

    def _final(self) -> Tensor:
        """Residual stream after the last layer (rows, length, d_model)."""
        if self._upper is not None:
            return self._upper.run(self._upper.input)
        return final_states(self.lm, self.inputs, detach=False)

    def nll(self, logits: Tensor, picked: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of the answer tokens, or of the picked ones.

        For END it is that of all tokens which do not continue the last word.
        """
        answers = self.answers if picked is None else self.answers[picked]
        return -self.lm.answer_logprobs(logits.log_softmax(-1), answers)

    def greedy_ids(self, states: Tensor) -> Tensor:
        """The likeliest token for each answer token; END where the answer has END and the word is not continued."""
        ids = self.read(states).argmax(-1)
        ends = (self.answers == END) & ~torch.isin(ids, self.lm.within_words)
        return ids.masked_fill(ends, END)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean negative log-likelihood of each row's answer tokens: (rows,)."""
        nll = self.nll(logits)
        total = torch.zeros(self.rows, device=nll.device).index_add(0, self.row, nll)
        return total / torch.tensor(self.lengths, device=nll.device, dtype=nll.dtype)

    def bytes(self) -> int:
        """Memory of the hidden states that are computed once."""
        return 0 if self._upper is None else self._upper.input.numel() * self._upper.input.element_size()


def pair(lm: LM, text: str, answer: str) -> Pair:
    """Tokens of a prompt, in the form of `lm.prompt`, and of an answer after it.

    The answer has END as its last token if it ends in a word.
    """
    prompt = lm.prompt(text)
    return lm.encode(prompt)[0], lm.answer_ids_with_end(prompt, answer)
