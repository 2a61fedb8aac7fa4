"""A batch of training examples, run from the first trained layer on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.finetune.examples import Example
from editors.model.lm import LM
from editors.model.upper_layers import UpperLayers


class ExampleBatch:
    """Calling it gives the predictions of all rows at the columns that count.

    They are differentiable with respect to the layers from `first_layer` on. The layers below run once and
    must not change between two calls. An encoder-decoder model runs its whole decoder each time.
    """

    def __init__(self, lm: LM, first_layer: int, rows: Sequence[Example]) -> None:
        self.lm = lm
        self.rows = torch.tensor([i for i, r in enumerate(rows) for _ in r.columns], device=lm.device)
        self.columns = torch.tensor([c for r in rows for c in r.columns], device=lm.device)
        if lm.is_seq2seq:
            self._encode(rows)
            return
        ids, mask = lm.pad([[*r.prompt, *r.answer_input] for r in rows])
        self._width = ids.shape[1]
        self.tokens = mask.bool()
        self._upper = UpperLayers(lm, first_layer)
        with self._upper.capturing(), torch.no_grad():
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _encode(self, rows: Sequence[Example]) -> None:
        lm = self.lm
        start = lm.model.config.decoder_start_token_id
        ids, mask = lm.pad([r.prompt for r in rows])
        decoder, decoder_mask = lm.pad([[start, *r.answer_input] for r in rows])
        self._width = decoder.shape[1]
        self.tokens = decoder_mask.bool()
        with torch.no_grad():
            encoded = lm.model.get_encoder()(input_ids=ids, attention_mask=mask)
        self._inputs = {
            "encoder_outputs": encoded,
            "attention_mask": mask,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": decoder_mask,
            "use_cache": False,
        }

    @property
    def positions(self) -> Tensor:
        """Indices of the columns that count in the batch flattened to (rows * tokens)."""
        return self.rows * self._width + self.columns

    def __call__(self) -> Tensor:
        """Log-probabilities in float32: (columns that count, vocabulary), row after row."""
        if self.lm.is_seq2seq:
            logits: Tensor = self.lm.model(**self._inputs).logits[self.rows, self.columns]
            return logits.float().log_softmax(-1)
        hidden = self._upper.run(self._upper.input).to(self.lm.device)
        return self.lm.head(hidden[self.rows, self.columns]).float().log_softmax(-1)
