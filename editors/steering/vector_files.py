"""Steering vectors made elsewhere, read from their files: GGUF (llama.cpp, repeng), safetensors, .pt of torch.save."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.model.lm import LM
from editors.steering.torch_files import tensors_of_torch
from editors.steering.vector import SteeringVector, new_vector

SUFFIXES = (".gguf", ".safetensors", ".pt")
MAX_FILE = 512 * 2**20
IMPORTED = "imported"
_KEY = re.compile(r"(?:direction|layer|layers|control_vector)?\.?(\d+)")


def read_vector(lm: LM, path: Path, name: str) -> SteeringVector:
    """The vector in a file. A dose of 1 adds, after each of its layers, exactly what the file has for that layer.

    `direction.N` of a GGUF file is added after layer N, as llama.cpp and repeng do. A safetensors file has `layer.N`
    or `direction.N`, or one tensor (layers, d_model); for a .pt file see torch_files.py. Raises InvalidEdit that says
    what is wrong with the file.
    """
    read = {".gguf": _of_gguf, ".safetensors": _of_safetensors, ".pt": _of_torch}
    found = read[path.suffix](path)
    for layer, value in found.items():
        if value.shape != (lm.d_model,):
            raise InvalidEdit(
                f"{path.name} has vectors of {tuple(value.shape)} and this model's states have {lm.d_model} entries; "
                "it was made for another model"
            )
        if not 0 <= layer < lm.n_layers:
            raise InvalidEdit(f"{path.name} has layer {layer}; this model has layers 0 to {lm.n_layers - 1}")
        if value.layout != torch.strided or not value.is_floating_point():
            raise InvalidEdit(f"{path.name} has no floats at layer {layer}: {value.dtype} ({value.layout})")
        if not torch.isfinite(value).all():
            raise InvalidEdit(f"{path.name} has numbers at layer {layer} that are not finite")
    floats = {layer: value.detach().float() for layer, value in sorted(found.items())}
    acting = {layer: value for layer, value in floats.items() if float(value.norm()) > 0}
    if not acting:
        raise InvalidEdit(f"{path.name} has no vector that is not zero")
    directions, norms = torch.zeros(lm.n_layers, lm.d_model), torch.zeros(lm.n_layers)
    for layer, value in acting.items():
        length = value.norm()
        directions[layer] = value / length
        norms[layer] = length * len(acting) ** 0.5  # a multiplier is shared out over the layers
    return new_vector(
        IMPORTED, tuple(acting), directions, norms, {"name": name, "pairs": 0, "file": path.name}
    )


def _of_gguf(path: Path) -> dict[int, Tensor]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError, AttributeError) as error:
        raise InvalidEdit(f"{path.name} is no GGUF file that can be read: {error}") from error
    return _by_layer(path, {name: torch.tensor(values).flatten() for name, values in found.items()})


def _of_safetensors(path: Path) -> dict[int, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise InvalidEdit(f"{path.name} is no safetensors file that can be read: {error}") from error
    if len(tensors) == 1:
        (only,) = tensors.values()
        if only.dim() == 2:
            return dict(enumerate(only))
    return _by_layer(path, tensors)


def _of_torch(path: Path) -> dict[int, Tensor]:
    return _by_layer(path, tensors_of_torch(path, MAX_FILE))


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, value in tensors.items():
        if (match := _KEY.fullmatch(name)) is None:
            raise InvalidEdit(
                f"{path.name} has a tensor {name[:80]!r}; a control vector has direction.N or layer.N for each layer"
            )
        found[int(match[1])] = value
    return found
