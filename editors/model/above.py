"""Run the part of the model above one MLP again and again, with other values at one token.

What a changed value at the subject's last token cannot reach is computed once: every layer up
to the edited one, and, in the layers above, the keys and values of all tokens before it
(attention is causal). What is left is one short suffix per row through the upper layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicCache

from editors.errors import Unsupported
from editors.model.activations import first, hooked, pick_rows, record, replace
from editors.model.lm import LM
from editors.model.precision import cast, copies_above, head_copy


@dataclass(frozen=True)
class Row:
    """One sequence: its token ids and the index of the token whose MLP output is varied."""

    ids: tuple[int, ...]
    position: int
    also: tuple[int, ...] = ()  # later tokens that get the same change: the subject named again


class _PrefixCache(Cache):
    """Keys and values of the constant prefix, put in front of whatever comes; never grows."""

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__(layers=[])
        self.prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        if layer_idx not in self.prefix:
            return key_states, value_states
        keys, values = self.prefix[layer_idx]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def pick_rows(self, index: Tensor, n: int) -> _PrefixCache:
        return _PrefixCache({i: pick_rows(kv, index, n) for i, kv in self.prefix.items()})

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return int(self.prefix[layer_idx][0].shape[-2]) if layer_idx in self.prefix else 0


class Above:
    """The layers above (and the MLP of) `layer`, with the token `position` of each row in column 0.

    `key` (n, d_in) and `value` (n, d_out) are the MLP output projection's input and output at
    that token, `state` (n, d_model) the residual stream after the layer there; `lengths` are the
    rows' lengths from that token on. With `dtype` the layers above run in that precision, on
    copies; keys and values stay in the model's own. With `attention` the layer's attention output
    can be varied too. Raises Unsupported for an encoder-decoder model, where a later layer's input
    does not depend on one token alone.
    """

    def __init__(
        self,
        lm: LM,
        layer: int,
        rows: Sequence[Row],
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
            lm.module(f"{lm.arch.layers}.{layer}.{lm.arch.attn_out}.weight") if attention else None
        )
        self._out = lm.module(lm.mlp_out(layer))
        self._dtype = dtype
        self._copies = copies_above(lm, layer, dtype) if dtype else {}
        ids, mask, self._prefix_length = self._align(rows)
        self._varied = torch.zeros((len(rows), ids.shape[1] - self._prefix_length, 1), device=lm.device)
        for i, row in enumerate(rows):
            self._varied[i, [0, *(c - row.position for c in row.also)], 0] = 1
        with torch.no_grad():
            self._run_once(ids, mask)

    def _align(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, int]:
        prefix = max(r.position for r in rows)
        left, left_mask = (
            self.lm.pad([r.ids[: r.position] for r in rows], left=True) if prefix else (None, None)
        )
        right, right_mask = self.lm.pad([r.ids[r.position :] for r in rows])
        if left is None or left_mask is None:
            return right, right_mask, 0
        return torch.cat([left, right], 1), torch.cat([left_mask, right_mask], 1), prefix

    def _run_once(self, ids: Tensor, mask: Tensor) -> None:
        p, lm = self._prefix_length, self.lm
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        if p:
            self._base(
                input_ids=ids[:, :p],
                attention_mask=mask[:, :p],
                position_ids=positions[:, :p],
                past_key_values=cache,
                use_cache=True,
            )
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = [
            lm.layers[i].register_forward_pre_hook(self._keep_call(i), with_kwargs=True)
            for i in range(self.layer, lm.n_layers)
        ]
        handles.append(self._out.register_forward_hook(self._keep_key))
        handles.append(lm.layers[self.layer].register_forward_hook(self._keep_output))
        with hooked(handles):
            self._base(
                input_ids=ids[:, p:],
                attention_mask=mask,
                position_ids=positions[:, p:],
                past_key_values=cache,
                use_cache=True,
            )
        prefix = {
            i: (_filled(cache, i).keys[..., :p, :], _filled(cache, i).values[..., :p, :])
            for i in range(self._first, lm.n_layers)
            if p
        }
        self._calls = {i: _with_cache(c, _PrefixCache(prefix)) for i, c in self._calls.items()}

    def _base(self, **inputs: Any) -> None:
        """Run all layers, those above in the lower precision where one is wanted."""
        lm, lower = self.lm, self._dtype
        names: dict[str, Tensor] = {}
        casts = []
        if lower is not None:
            stem = lm.arch.layers.removeprefix(f"{lm.model.base_model_prefix}.")
            for i, copies in self._copies.items():
                names |= {f"{stem}.{i}.{name}": copy for name, copy in copies.items()}
                casts.append(
                    lm.layers[i].register_forward_pre_hook(_cast_call(lower), with_kwargs=True, prepend=True)
                )
        with hooked(casts), record({"last": lm.layers[-1]}, stop=True):
            functional_call(lm.base_model, names, kwargs=inputs)

    def _keep_call(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if i == self.layer:
                self._input = hidden
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self._calls[i] = (args[1:], rest)

        return hook

    def _keep_key(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        shape = (len(self.lengths), -1)
        n, width, home = len(self.lengths), self._input.shape[1], self.lm.device
        self.key = args[0].reshape(n, width, -1)[:, 0].reshape(shape).clone().to(home)
        self.value = output.reshape(n, width, -1)[:, 0].reshape(shape).clone().to(home)

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = first(output)
        self.state = self._output[:, 0].clone().to(self.lm.device)

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
            for i in range(self.layer + 1, self.lm.n_layers):
                args, kwargs = self._calls[i]
                hidden = first(
                    functional_call(self.lm.layers[i], self._copies.get(i, {}), (hidden, *args), kwargs)
                )
        return hidden.to(self.lm.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of some of the last layer's states, in the precision of the search."""
        return self.lm.head(hidden, head_copy(self.lm, self._dtype) if self._dtype else None)

    def _layer_with(self, delta: Tensor, attention: Tensor | None) -> Tensor:
        changes = {self._out: self._adding(delta)}
        if attention is not None:
            assert self._attention is not None
            changes[self._attention] = self._adding(attention)
        args, kwargs = self._calls[self.layer]
        with replace(changes):
            return first(self.lm.layers[self.layer](self._input, *args, **kwargs))

    def _adding(self, change: Tensor) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:  # OPT flattens tokens before its MLP
            return output + (self._varied * change[:, None]).to(output).reshape(output.shape)

        return add

    def select(self, keep: Sequence[int]) -> None:
        """Go on with only these rows (indices into the present ones)."""
        index = torch.tensor(list(keep), device=self.key.device)
        n = len(self.lengths)
        self.lengths = [self.lengths[i] for i in keep]
        self.key, self.value, self.state = self.key[index], self.value[index], self.state[index]
        self._input, self._output, self._varied = (
            x[index.to(x.device)] for x in (self._input, self._output, self._varied)
        )
        self._calls = {i: pick_rows(call, index, n) for i, call in self._calls.items()}


def _filled(cache: DynamicCache, i: int) -> Any:
    """A layer of the cache after it was filled."""
    return cache.layers[i]


def _with_cache(
    call: tuple[tuple[Any, ...], dict[str, Any]], cache: Cache
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = call
    return (
        tuple(cache if isinstance(a, Cache) else a for a in args),
        {k: cache if isinstance(v, Cache) else v for k, v in kwargs.items()},
    )


def _cast_call(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cast(args, dtype), cast(kwargs, dtype)

    return hook
