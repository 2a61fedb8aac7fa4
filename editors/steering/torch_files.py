"""Steering vectors that torch.save wrote (.pt), as the authors of CAA and of the refusal direction share them.

Such a file is a pickle, which can run code. It is read by torch's restricted reader (`weights_only=True`), which makes
tensors, numbers, strings and containers and calls nothing else; and only after its size, unpacked, was looked at.

    vec_layer_N_MODEL.pt    one direction, added after layer N (Rimsky et al. 2024, arXiv 2312.06681)
    direction.pt            one direction, taken before layer N, where `direction_metadata.json` beside it has
                            {"layer": N} (Arditi et al. 2024, arXiv 2406.11717): added after layer N - 1
    any name                a tensor (layers, d_model), or directions by layer, {N: tensor} or {"layer.N": tensor}
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.bounded_files import read_bounded
from editors.errors import InvalidEdit

METADATA = "direction_metadata.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_LAYERS = 10_000
"""Rows of a tensor that are taken for one layer each."""
_NAMED = re.compile(r"(?:^|_)layer[_.-]?(\d+)(?:[_.-]|$)")


def tensors_of_torch(path: Path, most: int) -> dict[str, Tensor]:
    """The directions by `layer.N`. Raises InvalidEdit that says what is wrong with the file.

    `most`: bytes that the file may have, unpacked.
    """
    found = _read(path, most)
    if isinstance(found, Tensor):
        _refuse_unusual(path, [found], most)
        return _by_layer(path, found)
    if isinstance(found, Mapping) and found and all(isinstance(one, Tensor) for one in found.values()):
        _refuse_unusual(path, list(found.values()), most)
        return {
            f"layer.{key}" if isinstance(key, int) else str(key): one.squeeze() for key, one in found.items()
        }
    raise InvalidEdit(
        f"{path.name} holds {type(found).__name__}; a vector is one tensor, or a dict of one tensor for each layer"
    )


def _read(path: Path, most: int) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InvalidEdit(
            f"{path.name} is no file of torch.save that can be read ({error}); files from before torch 1.6 must be "
            "saved again"
        ) from error
    if size > most:
        raise InvalidEdit(f"{path.name} has {size:,} bytes unpacked, and at most {most:,} are read")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, the unpickler's own among them
        raise InvalidEdit(
            f"{path.name} cannot be read: it contains more than tensors, which could run code, or is damaged; save the "
            f"tensor alone, or as safetensors ({str(error).splitlines()[0][:200]})"
        ) from error


def _refuse_unusual(path: Path, tensors: Sequence[Tensor], most: int) -> None:
    """Raise InvalidEdit for what is no plain tensor of floats, or is far larger than its file.

    A tensor that repeats one number (`expand`) has a small file and any number of rows.
    """
    for one in tensors:
        plain = one.layout == torch.strided and not one.is_nested and one.device.type == "cpu"
        if not plain or one.dtype not in FLOATS:
            raise InvalidEdit(f"{path.name} has a tensor of {one.dtype} ({one.layout}); a vector has floats")
    size = sum(one.numel() * one.element_size() for one in tensors)
    if size > most:
        raise InvalidEdit(f"{path.name} has tensors of {size:,} bytes, and at most {most:,} are read")


def _by_layer(path: Path, found: Tensor) -> dict[str, Tensor]:
    """A tensor as directions: one, whose layer stands in the file's name or beside it, or one for each layer."""
    value = found.squeeze()
    if value.dim() == 2:
        if len(value) > MOST_LAYERS:
            raise InvalidEdit(f"{path.name} has {len(value):,} directions; a model has fewer layers")
        return {f"layer.{layer}": row for layer, row in enumerate(value)}
    if value.dim() != 1:
        raise InvalidEdit(
            f"{path.name} has a tensor of {tuple(found.shape)}; one of (d_model,) or (layers, d_model) is a vector. Of "
            "the candidates of refusal_direction (positions, layers, d_model) take the chosen one, direction.pt"
        )
    return {f"layer.{_layer(path)}": value}


def _layer(path: Path) -> int:
    """The layer after which a file's only direction is added."""
    if match := _NAMED.search(path.stem):
        return int(match[1])
    beside = path.with_name(METADATA)
    try:
        layer = json.loads(read_bounded(beside, 10_000))["layer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidEdit(
            f"{path.name} has one direction and does not say of which layer; name the file vec_layer_N_MODEL.pt (added "
            f"after layer N), or put {METADATA} beside it (taken before its `layer`)"
        ) from None
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
        raise InvalidEdit(
            f"{METADATA} beside {path.name} has layer {layer!r}; a direction is taken before layer 1 or later"
        )
    return layer - 1
