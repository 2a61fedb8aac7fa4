"""Prompts with their answers as one padded batch, for decoder-only and encoder-decoder models alike.

A decoder-only model reads the prompt and the answer as one sequence. An encoder-decoder model reads the prompt in
its encoder and the answer in its decoder. Either way, the answer's tokens stand one after another in one sequence,
that of the decoder layers: `predicting` gives the columns from which they are predicted, `answers` their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.model.activations import folded, record
from editors.model.spoken_model import SpokenModel
from editors.model.text import Prompt

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and those of its answer that the model reads."""


@dataclass(frozen=True)
class AnswerInputs:
    """A padded batch: what the model is called with, and where each row's answer stands."""

    call: dict[str, Any]  # arguments of the model's forward pass
    mask: Tensor  # (n, width) 1 where the sequence of the decoder layers has a token
    first: tuple[int, ...]  # per row, the column from which the answer's first token is predicted
    lengths: tuple[int, ...]  # per row, how many tokens of the answer are read

    @property
    def width(self) -> int:
        """Columns of the sequence that the decoder layers read."""
        return self.mask.shape[1]

    @property
    def prompt_mask(self) -> Tensor:
        """(n, length) 1 where there is a token of the input that has the prompt (the encoder's, if there is one)."""
        mask: Tensor = self.call["attention_mask"]
        return mask

    def beginning(self, n: int) -> AnswerInputs:
        """The first n rows."""
        call = {name: x[:n] if isinstance(x, Tensor) else x for name, x in self.call.items()}
        return AnswerInputs(call, self.mask[:n], self.first[:n], self.lengths[:n])

    def predicting(self, row: int, tokens: int) -> slice:
        """The columns of a row from which the first `tokens` tokens of its answer are predicted."""
        return slice(self.first[row], self.first[row] + tokens)

    def answers(self, row: int) -> range:
        """The columns of a row at which its answer's tokens are read."""
        return range(self.first[row] + 1, self.first[row] + 1 + self.lengths[row])


def answer_inputs(lm: SpokenModel, rows: Sequence[Row]) -> AnswerInputs:
    """Pad prompts with their answers."""
    lengths = tuple(len(answer) for _, answer in rows)
    first = tuple(lm.answer_column(prompt) for prompt, _ in rows)
    if lm.is_seq2seq:
        ids, mask = lm.pad([prompt for prompt, _ in rows])
        start = lm.model.config.decoder_start_token_id
        decoder, decoder_mask = lm.pad([[start, *answer] for _, answer in rows])
        call = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": decoder_mask,
            "use_cache": False,
        }
        return AnswerInputs(call, decoder_mask, first, lengths)
    ids, mask = lm.pad([[*prompt, *answer] for prompt, answer in rows])
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return AnswerInputs(call, mask, first, lengths)


def text_row(lm: SpokenModel, ids: Sequence[int]) -> Row:
    """A text of its own as a row: every token but the first is the answer.

    An encoder-decoder model reads the whole text and says it again.
    """
    return (ids, ids) if lm.is_seq2seq else (ids[:1], ids[1:])


def text_pair(lm: SpokenModel, text: str) -> tuple[Prompt, str]:
    """A text of its own as prompt and answer: its first word and the rest.

    An encoder-decoder model reads the whole text and says it again.
    """
    first, _, rest = text.partition(" ")
    return (lm.prompt(text, chat=False), text) if lm.is_seq2seq else (lm.prompt(first, chat=False), rest)


def final_states(lm: SpokenModel, inputs: AnswerInputs, *, detach: bool = True) -> Tensor:
    """Residual stream after the last (decoder) layer, before the final norm: (n, width, d_model).

    `detach`: without gradients.
    """
    with record({"last": lm.layers[-1]}, detach=detach) as seen:
        lm.base_model(**inputs.call)
    return folded(seen["last"]).to(lm.device)


def columns_of(inputs: AnswerInputs, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows and columns (k,) of the predictions of the first `tokens[i]` answer tokens of each row i, row after row."""
    places = [(i, c) for i, n in enumerate(tokens) for c in range(inputs.first[i], inputs.first[i] + n)]
    device = inputs.mask.device
    rows, columns = (torch.tensor(x, dtype=torch.long, device=device) for x in zip(*places, strict=True))
    return rows, columns
