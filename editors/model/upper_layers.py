"""Run the layers from one on directly, over inputs that stay the same.

What lies below the first of these layers, and (attention is causal) the keys and values of the
tokens before a change, is computed once. The arguments with which the model calls its layers
(masks, positions, rotary embeddings) are recorded in that pass and used again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from editors.model.activations import first, folded, hooked, pick_rows, record, unfolded
from editors.model.lm import LM
from editors.model.precision import cast, copies_above
from editors.model.shared_keys import ARGUMENT, SharedKeys, read_in, shared_of

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one layer, positional and named, without the hidden states."""


Prefix = dict[int, tuple[Tensor, Tensor]]
"""Keys and values (rows, heads, length, d_head) of the tokens before a change, by layer."""


class PrefixCache(Cache):
    """Keys and values of the tokens before a change, of one layer. They are put before new ones and never grow.

    Where the layer is called with a multiple of the prefix's rows, the prefix is repeated for them.
    """

    def __init__(self, prefix: Prefix) -> None:
        super().__init__(layers=[])
        self.prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        if layer_idx not in self.prefix:
            return key_states, value_states
        keys, values = self.prefix[layer_idx]
        return _joined(keys, key_states), _joined(values, value_states)

    def pick_rows(self, index: Tensor, n: int) -> PrefixCache:
        return PrefixCache({i: pick_rows(kv, index, n) for i, kv in self.prefix.items()})

    def cast(self, dtype: torch.dtype) -> PrefixCache:
        return PrefixCache({i: cast(kv, dtype) for i, kv in self.prefix.items()})

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return int(self.prefix[layer_idx][0].shape[-2]) if layer_idx in self.prefix else 0


def _joined(prefix: Tensor, new: Tensor) -> Tensor:
    copies = new.shape[0] // prefix.shape[0]
    if copies > 1:
        prefix = prefix[None].expand(copies, *(-1,) * prefix.dim()).reshape(new.shape[0], *prefix.shape[1:])
    return torch.cat([prefix, new], dim=-2)


class UpperLayers:
    """The layers from `first_layer` on (the decoder's, in an encoder-decoder model).

    Run the model once inside `capturing`; afterwards `run` and `layer` call the layers alone. `input`
    (rows, length, d_model) is what the first of them was given. With `dtype` the layers above it (or above `above`)
    run on copies in that precision. With `checkpointing` a backward pass computes each layer again instead of
    keeping its activations.
    """

    input: Tensor

    def __init__(
        self,
        lm: LM,
        first_layer: int,
        *,
        dtype: torch.dtype | None = None,
        above: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.lm, self.first_layer, self.checkpointing = lm, first_layer, checkpointing
        self._dtype = dtype
        self._copies = copies_above(lm, first_layer if above is None else above, dtype) if dtype else {}
        self._calls: dict[int, LayerCall] = {}
        self._shared: SharedKeys | None = None  # keys and values that several layers share

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Record the arguments of every upper layer while the model runs in this block."""
        indices = range(self.first_layer, self.lm.n_layers)
        handles = [
            self.lm.layers[i].register_forward_pre_hook(self._recorder(i), with_kwargs=True) for i in indices
        ]
        with hooked(handles):
            yield

    def _recorder(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i == self.first_layer:
                self.input = folded(args[0] if args else kwargs["hidden_states"])
            self._shared = shared_of(kwargs)
            self._calls[i] = (
                args[1:],
                {k: v for k, v in kwargs.items() if k not in ("hidden_states", ARGUMENT)},
            )

        return hook

    def forward(self, **inputs: Any) -> Tensor:
        """Run the whole model up to its last layer, each layer in its precision; returns that layer's output."""
        lm, dtype = self.lm, self._dtype
        parameters: dict[str, Tensor] = {}
        casts = []
        if dtype is not None:
            stem = lm.arch.layers.removeprefix(f"{lm.model.base_model_prefix}.")
            for i, copies in self._copies.items():
                parameters |= {f"{stem}.{i}.{name}": tensor for name, tensor in copies.items()}
                hook = _caster(dtype)
                casts.append(lm.layers[i].register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        with hooked(casts), record({"last": lm.layers[-1]}, stop=True) as seen:
            functional_call(lm.base_model, parameters, kwargs=inputs)
        return seen["last"]

    def use_prefix(self, prefix: Prefix | None) -> None:
        """Call each layer with its part of this prefix (None: no cache) instead of the captured pass's cache."""
        for i, (args, kwargs) in self._calls.items():
            cache = None if prefix is None else PrefixCache({i: prefix[i]} if i in prefix else {})
            self._calls[i] = (
                tuple(cache if isinstance(a, Cache) else a for a in args),
                {k: cache if isinstance(v, Cache) else v for k, v in kwargs.items()},
            )

    def rows(self, index: Tensor, n: int) -> UpperLayers:
        """The same for some of the `n` rows; nothing is computed again."""
        picked = copy(self)
        picked.input = self.input[index.to(self.input.device)]
        picked._calls = {i: pick_rows(call, index, n) for i, call in self._calls.items()}
        picked._shared = None if self._shared is None else self._shared.pick_rows(index, n)
        return picked

    def lowered(self, layer: int, dtype: torch.dtype) -> UpperLayers:
        """The layers above `layer` with the captured arguments, in another precision."""
        above = copy(self)
        above.first_layer, above._dtype = layer + 1, dtype
        above._copies = copies_above(self.lm, layer, dtype)
        above._calls = {i: cast(call, dtype) for i, call in self._calls.items() if i > layer}
        above._shared = None if self._shared is None else SharedKeys(self._shared, dtype)
        return above

    def run(self, hidden: Tensor, start: int | None = None, end: int | None = None) -> Tensor:
        """Residual stream after layer `end` (default: the last), from the input `hidden` of layer `start`."""
        last = self.lm.n_layers - 1 if end is None else end
        for i in range(self.first_layer if start is None else start, last + 1):
            hidden = self.layer(i, hidden)
        return hidden

    def layer(self, i: int, hidden: Tensor, adapt: Callable[[Any], Any] = lambda value: value) -> Tensor:
        """Output of layer `i` for `hidden` (rows, length, d_model); `adapt` may replace captured arguments."""
        args, kwargs = self._calls[i]
        args = tuple(adapt(a) for a in args)
        kwargs = {name: adapt(value) for name, value in kwargs.items()}
        if self._shared is not None:
            kwargs[ARGUMENT] = self._shared
            kwargs = kwargs if self._copies.get(i) is None else read_in(kwargs, self._dtype)
        call = partial(self._call, i, args, kwargs)
        if self.checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(call, hidden, use_reentrant=False)
            return output
        return call(hidden)

    def _call(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
        layer, copies = self.lm.layers[i], self._copies.get(i)
        hidden = unfolded(hidden, self.lm.arch.streams)
        if copies is None:
            return first(layer(hidden, *args, **kwargs))
        return first(functional_call(layer, copies, (hidden, *args), kwargs))


def _caster(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cast(args, dtype), cast(read_in(kwargs, dtype), dtype)

    return hook
