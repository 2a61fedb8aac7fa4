"""Run single layers on changed states, without repeating what the change does not touch.

A change at token t does not touch the positions before t (attention is causal), and a change at
layer l does not touch the layers below l. So a changed row is computed only for positions t.. and
layers l.. ; the rest comes from a `Run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from editors.errors import Unsupported
from editors.locate.traced_prompt import TracedPrompt, TracedRun, decode, reads_tokens
from editors.model.caches import new_cache, shares_keys
from editors.model.lm import LM
from editors.model.upper_layers import UpperLayers


def refused(lm: LM) -> str | None:
    """Why single layers of the model are not run, so that causal_trace and knowledge_neurons refuse it; or None."""
    if reads_tokens(lm) or shares_keys(lm):
        return (
            f"layers of this {lm.arch.family} model read token embeddings of their own or keys of other layers, so "
            "they are not run one by one; use method attribution_patching or logit_lens"
        )
    return None


class TracedRows:
    """The layers of a model on positions `start`.. of a traced prompt.

    A batch holds one or more copies of all n rows of `run`, copy after copy. `start` is what
    `TracedPrompt.upper_start` says: in an encoder-decoder model 0, and the positions are all of the decoder's.
    Raises Unsupported where a layer reads more than the states and keys of the run.
    """

    def __init__(self, lm: LM, traced: TracedPrompt, run: TracedRun, start: int) -> None:
        if (refusal := refused(lm)) is not None:
            raise Unsupported(refusal)
        self.lm, self.traced, self.run, self.start = lm, traced, run, start
        self._encoder = None if run.encoder is None else run.encoder[:1]
        self._upper = UpperLayers(lm, 0)
        with self._upper.capturing(), torch.no_grad():
            self._call_once()
        prefix = {i: (k[:, :, :start], v[:, :, :start]) for i, (k, v) in enumerate(run.keys)}
        self._upper.use_prefix(prefix if start else None)

    def _call_once(self) -> None:
        """Run one row, so that the arguments of its layers (masks, positions) can be captured."""
        if self._encoder is not None:
            decode(self.lm, self.traced, self._encoder)
            return
        ids = torch.tensor([self.traced.ids[self.start :]], device=self.lm.device)
        length = len(self.traced.ids)
        cache = new_cache(self.lm) if self.start else None
        for i, (keys, values) in enumerate(self.run.keys if cache is not None else ()):
            assert cache is not None
            cache.update(keys[:1, :, : self.start], values[:1, :, : self.start], i)
        self.lm.base_model(
            input_ids=ids,
            attention_mask=torch.ones(1, length, dtype=torch.long, device=ids.device),
            position_ids=torch.arange(self.start, length, device=ids.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )

    def layer(self, i: int, hidden: Tensor) -> Tensor:
        """Output of layer `i` for input (copies * n, S - start, d_model), in the same shape."""
        copies = hidden.shape[0] // self.run.hidden[0].shape[0]
        return self._upper.layer(i, hidden, lambda value: self._repeated(value, copies)).to(self.lm.device)

    def _repeated(self, value: Any, copies: int) -> Any:
        """The encoder's states of one row become those of every row; any other argument is unchanged."""
        if value is self._encoder and value is not None:
            assert self.run.encoder is not None
            return self.run.encoder.repeat(copies, 1, 1)
        return value
