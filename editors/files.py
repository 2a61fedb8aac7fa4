"""Reading safetensors with their metadata, and writing files in one step, so that no reader sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian


class DamagedFile(ValueError):
    """The bytes are not a safetensors file; the message says what is wrong with them."""


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, given its bytes; empty when it has none. Raises DamagedFile."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    try:
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = header.get("__metadata__") or {}
    except (ValueError, AttributeError) as error:
        raise DamagedFile(f"its header is not a JSON object: {error}") from error
    if not isinstance(metadata, dict):
        raise DamagedFile("its metadata is not a JSON object")
    return {str(key): str(value) for key, value in metadata.items()}


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file, given its bytes. Raises DamagedFile."""
    metadata = metadata_of(data)
    try:
        return safetensors.torch.load(data), metadata
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedFile(str(error)) from error


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these tensors and this metadata.

    safetensors writes several metadata keys in no fixed order; where the bytes are hashed, use one key.
    """
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(parts, metadata=dict(metadata))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in one step: it has all of `data`, also after a power loss, or stays as it was.

    Makes missing folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
