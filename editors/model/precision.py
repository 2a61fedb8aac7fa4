"""Lower-precision copies of the upper layers, for searches that may be approximate on a processor that is faster so."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from editors.model.architecture import resolve
from editors.model.lm import LM

_WHOLE = "whole."


def search_dtype(lm: LM) -> torch.dtype | None:
    """bfloat16 for a float32 model on a CPU with bfloat16 arithmetic, else None: the model's own.

    Matrix products of a few rows wait for memory, so half the bytes take half the time. A quantised layer computes in
    the type that it was loaded for, and a router may choose other experts in another type.
    """
    kept = lm.quantisation is not None or bool(lm.experts)
    fast = not kept and lm.device.type == "cpu" and lm.dtype == torch.float32 and bfloat16_is_fast()
    return torch.bfloat16 if fast else None


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 in hardware.

    oneDNN also says yes to AVX-512 without it, where bfloat16 is emulated at a fifth of float32's speed.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def copies_above(lm: LM, layer: int, dtype: torch.dtype) -> dict[int, dict[str, Tensor]]:
    """The parameters of the layers above `layer` in another precision: layer -> name in the layer -> copy."""
    return {
        i: {n: _copy(lm, f"{i}.{n}", p.data, dtype) for n, p in lm.layers[i].named_parameters()}
        for i in range(layer + 1, lm.n_layers)
    }


def head_copy(lm: LM, dtype: torch.dtype) -> Tensor:
    """The language-model head's weight in another precision."""
    return _copy(lm, "head", resolve(lm.model, lm.arch.head).weight.data, dtype)  # type: ignore[arg-type]


class LoweredCopies:
    """Copies of a model's weights in another precision, kept with the model (an extension of it)."""

    def __init__(self, lm: LM) -> None:
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (the weight it is a copy of, the copy)

    def of(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of a weight; made again when the weight was swapped for another tensor.

        The weight itself is held, so that no other tensor can take its address.
        """
        entry = self._copies.get(name)
        if entry is None or entry[0].data_ptr() != weight.data_ptr() or entry[1].dtype != dtype:
            entry = self._copies[name] = (weight, weight.to(dtype))
        return entry[1]

    def forget(self, prefix: str) -> None:
        """Drop the copies whose names begin with `prefix`."""
        for name in [n for n in list(self._copies) if n.startswith(prefix)]:  # others may add some meanwhile
            self._copies.pop(name, None)

    def __len__(self) -> int:
        return len(self._copies)


def _copy(lm: LM, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return lm.extension(LoweredCopies).of(name, weight, dtype)


@contextmanager
def lowered(lm: LM, dtype: torch.dtype | None, *, keep: bool = False) -> Iterator[None]:
    """Run the whole model in another precision (None: as it is); the weights themselves are put back at the end.

    With `keep` the copies stay for the next time, until `forget`.
    """
    named = list(lm.model.named_parameters()) if dtype is not None else []
    former = {name: (p, p.data) for name, p in named if p.is_floating_point()}
    try:
        for name, (parameter, data) in former.items():
            assert dtype is not None
            parameter.data = _copy(lm, _WHOLE + name, data, dtype) if keep else data.to(dtype)
        yield
    finally:
        for parameter, data in former.values():
            parameter.data = data


def forget(lm: LM) -> None:
    """Drop the copies of the whole model that `lowered` has kept."""
    lm.extension(LoweredCopies).forget(_WHOLE)


def cast(item: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in `item` (tensors, tuples, dicts, and whatever has `cast`) in another precision.

    The lowest number of a mask stays finite: a row that sees nothing would turn into NaN otherwise.
    """
    if isinstance(item, Tensor):
        return item.to(dtype).clamp(min=torch.finfo(dtype).min) if item.is_floating_point() else item
    if isinstance(item, tuple):
        return tuple(cast(x, dtype) for x in item)
    if isinstance(item, dict):
        return {k: cast(v, dtype) for k, v in item.items()}
    return item.cast(dtype) if hasattr(item, "cast") else item
