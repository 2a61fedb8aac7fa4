"""Layers called directly, from any layer up, on the positions from one token on.

A change at token t leaves every position before t as it was (attention is causal), and a change
at layer l leaves every layer below as it was. So what is common is computed once, in `Run`s, and
a changed row is only its tail: positions t.. through layers l..
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from editors.locate.scene import Run, Scene, decode
from editors.model.activations import first, hooked
from editors.model.lm import LM


class _Prefix(Cache):
    """Keys and values of the positions before the tail, one set per run row, repeated over `copies`."""

    def __init__(self, keys: tuple[tuple[Tensor, Tensor], ...], length: int) -> None:
        super().__init__(layers=[])
        self.keys, self.length = keys, length

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        keys, values = self.keys[layer_idx]
        return self._join(keys, key_states), self._join(values, value_states)

    def _join(self, prefix: Tensor, tail: Tensor) -> Tensor:
        copies = tail.shape[0] // prefix.shape[0]
        head = prefix[None, :, :, : self.length].expand(copies, *(-1,) * prefix.dim())
        return torch.cat([head.reshape(tail.shape[0], *head.shape[2:]), tail], dim=-2)

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self.length


class Tail:
    """The layers of a scene on positions `start`..; rows are copies of the rows of `run`, copy by copy.

    `start` must be 0 in an encoder-decoder model, whose tail is the whole decoder.
    """

    def __init__(self, lm: LM, scene: Scene, run: Run, start: int) -> None:
        self.lm, self.scene, self.run, self.start = lm, scene, run, start
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._encoder = None if run.encoder is None else run.encoder[:1]
        handles = [
            layer.register_forward_pre_hook(self._keep(i), with_kwargs=True)
            for i, layer in enumerate(lm.layers)
        ]
        with hooked(handles), torch.no_grad():
            self._call_once()
        self._prefix = _Prefix(run.keys, start) if start else None

    def _keep(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[i] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    def _call_once(self) -> None:
        """One pass of one row, for the arguments its layers are called with: masks and positions."""
        if self._encoder is not None:
            decode(self.lm, self.scene, self._encoder)
            return
        ids = torch.tensor([self.scene.ids[self.start :]], device=self.lm.device)
        length = len(self.scene.ids)
        cache = DynamicCache() if self.start else None
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
        """Layer `i` on (copies * n, S - start, d_model)."""
        args, kwargs = self._calls[i]
        copies = hidden.shape[0] // self.run.hidden[0].shape[0]
        own = tuple(self._own(a, copies) for a in args)
        named = {name: self._own(value, copies) for name, value in kwargs.items()}
        return first(self.lm.layers[i](hidden, *own, **named)).to(self.lm.device)

    def _own(self, value: Any, copies: int) -> Any:
        if isinstance(value, Cache):
            return self._prefix
        if value is self._encoder and value is not None:
            assert self.run.encoder is not None
            return self.run.encoder.repeat(copies, 1, 1)
        return value
