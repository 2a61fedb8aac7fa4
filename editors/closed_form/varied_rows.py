"""Rows of text in which one token's MLP output is varied at every step: what a search for a value runs.

A changed value at the subject's last token reaches only that token and the later ones, in the
layers above. So one pass runs short suffixes through the upper layers; of a model with recurrent
layers, whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from editors.errors import Unsupported
from editors.model.activations import first, replace
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.model.precision import head_copy
from editors.model.suffixes import capture_suffixes
from editors.model.upper_layers import UpperLayers


@dataclass(frozen=True)
class VariedRow:
    """One sequence: its token ids and the index of the token whose MLP output is varied."""

    ids: tuple[int, ...]
    position: int
    also: tuple[int, ...] = ()  # later tokens that get the same change: the subject named again


class VariedRows:
    """The layers above (and the MLP of) `layer`, with the token `position` of each row in column 0.

    `key` (n, d_in) and `value` (n, d_out) are the MLP output projection's input and output at
    that token, `state` (n, d_model) the residual stream after the layer there; `lengths` are the
    rows' lengths from that token on. With `dtype` the layers above run in that precision, on
    copies; keys and values stay in the model's own. With `attention` the layer's attention output
    can be varied too. Raises Unsupported for an encoder-decoder model, where a later layer's input
    does not depend on one token alone.
    """

    key: Tensor
    value: Tensor
    _keys: Tensor

    def __init__(
        self,
        lm: LM,
        layer: int,
        rows: Sequence[VariedRow],
        dtype: torch.dtype | None = None,
        *,
        attention: bool = False,
    ) -> None:
        if lm.is_seq2seq:
            raise Unsupported(
                f"{lm.arch.family} is an encoder-decoder model; use ft, lora, mend or serac instead"
            )
        self.lm, self.layer = lm, layer
        self.lengths = [len(r.ids) - r.position for r in rows]
        self._first = layer + 1 if lm.arch.mlp_adds_directly and not attention else layer
        self._attention = (
            resolve(lm.layers[layer], lm.arch.mixer_out(lm.layers[layer])) if attention else None
        )
        self._mlp_out = lm.module(lm.mlp_out(layer))
        self._dtype = dtype
        self._upper = UpperLayers(lm, layer, dtype=dtype)
        ends = [(r.ids, r.position) for r in rows]
        captured = capture_suffixes(self._upper, ends, self._first, self._watch_once)
        self._column = captured.column  # of the varied token in what the layers are run on
        self._keys = self._keys[:, self._column :]
        self.key, self.value = self._keys[:, 0].clone(), self.value[:, self._column].clone()
        self.state = self._output[:, self._column].clone().to(lm.device)
        varied = torch.zeros(captured.mask.shape, device=lm.device)
        for i, row in enumerate(rows):
            varied[i, [0, *(c - row.position for c in row.also)]] = 1
        self._vary(varied)

    def _watch_once(self) -> list[RemovableHandle]:
        """Hooks that record the varied token's key, value and state."""
        return [
            self._mlp_out.register_forward_hook(self._record_key),
            self.lm.layers[self.layer].register_forward_hook(self._record_output),
        ]

    def _record_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        n, width, home = len(self.lengths), self._upper.input.shape[1], self.lm.device
        self._keys, self.value = (x.reshape(n, width, -1).to(home) for x in (args[0], output))

    def _record_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = first(output)

    def _vary(self, share: Tensor) -> None:
        """Let each token from the varied one on get this share (n, width) of a change, those before it none."""
        self._varied = nn.functional.pad(share, (self._column, 0))[..., None]

    def answer_by(self, reads: Tensor) -> None:
        """Change every token from the varied one on by as much as a weight would: `reads` (n, d_in) times its key.

        An update delta x^T of the MLP's output projection adds (x . key) delta at each token: nearly all of it at the
        subject, less where keys are held, and a little at the tokens after it.
        """
        self._vary(torch.einsum("nwd,nd->nw", self._keys.float(), reads.to(self._keys.device)))

    def __call__(self, delta: Tensor, attention: Tensor | None = None) -> Tensor:
        """Residual stream after the last layer when `delta` (n, d_out) is added to the MLP's output.

        `attention` (n, d_model) is added to the attention's output at the same token. Returns
        (n, longest suffix, d_model); column 0 is the varied token.
        """
        if self._first == self.layer:
            hidden = self._layer_with(delta, attention)
        else:
            hidden = self._output + (self._varied * delta[:, None]).to(self._output)
        hidden = hidden if self._dtype is None else hidden.to(self._dtype)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slow for a few short rows
            hidden = self._upper.run(hidden, self.layer + 1)
        return hidden[:, self._column :].to(self.lm.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some of the last layer's states, in the precision of the search."""
        return self.lm.head(hidden, head_copy(self.lm, self._dtype) if self._dtype else None)

    def _layer_with(self, delta: Tensor, attention: Tensor | None) -> Tensor:
        changes = {self._mlp_out: self._adding(delta)}
        if attention is not None:
            assert self._attention is not None
            changes[self._attention] = self._adding(attention)
        with replace(changes):
            return self._upper.layer(self.layer, self._upper.input)

    def _adding(self, change: Tensor) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:  # OPT flattens tokens before its MLP
            return output + (self._varied * change[:, None]).to(output).reshape(output.shape)

        return add

    def select(self, keep: Sequence[int]) -> None:
        """Go on with only these rows (indices into the present ones)."""
        index = torch.tensor(list(keep), device=self.key.device)
        self._upper = self._upper.rows(index, len(self.lengths))
        self.lengths = [self.lengths[i] for i in keep]
        self._keys = self._keys[index]
        self.key, self.value, self.state = self.key[index], self.value[index], self.state[index]
        self._output, self._varied = (x[index.to(x.device)] for x in (self._output, self._varied))
