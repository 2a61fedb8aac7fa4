"""The weights of a GGUF file as a safetensors file, one tensor after another, so that few are in memory at once.

transformers reads the whole vocabulary at each step of a conversion, by a reader that takes microseconds for each
byte, and holds the weights twice. Here the vocabulary is passed over where nobody needs it, and a large matrix is
turned into numbers some rows at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGUFValueType
from transformers import modeling_gguf_pytorch_utils as readers

from server.errors import ModelUnavailable

LONG = 1_000
"""Entries of an array of the header from which on it is a vocabulary."""
ROWS_AT_ONCE = 16 * 2**20
"""Numbers of a matrix that are made at once."""
ONE_BY_ONE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2")
"""What GGUF calls the families of which each tensor of the file is one of the model's."""
STEPS = 50
"""Reports of progress while weights are written, at most."""
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class QuickReader(gguf.GGUFReader):
    """A GGUF file whose long arrays are passed over.

    Of one of texts as many empty ones are left, since their number may be the vocabulary's size; of numbers the first.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, count, start = GGUFValueType(int(head[0][0])), int(head[1][0]), orig_offs + 12
        if count < LONG or kind == GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if kind == GGUFValueType.STRING:
            size = _strings_size(self.data[start:].data, count)
            return 12 + size, [*head, np.empty(0, np.uint8)], [2] * count, [GGUFValueType.ARRAY, kind]
        first = self._get(start, self.gguf_scalar_to_np[kind])
        return 12 + first.nbytes * count, [*head, first], [2], [GGUFValueType.ARRAY, kind]

    @property
    def architecture(self) -> str:
        """What GGUF calls the family."""
        return str(self.fields["general.architecture"].contents())


def _strings_size(data: memoryview, count: int) -> int:
    """Bytes of so many strings, each behind its length."""
    length, at = struct.Struct("=Q").unpack_from, 0
    for _ in range(count):
        at += 8 + length(data, at)[0]
    return at


@contextmanager
def quick_headers() -> Iterator[None]:
    """In this block transformers reads GGUF files by QuickReader. For a process that does nothing else."""
    package: Any = gguf
    former = package.GGUFReader
    package.GGUFReader = QuickReader
    try:
        yield
    finally:
        package.GGUFReader = former


class WeightFile:
    """A safetensors file that is written tensor by tensor.

    Raises ModelUnavailable when the GGUF file lacks weights of the model, or has one of another shape.
    """

    def __init__(self, reader: QuickReader, model: Any, dtype: torch.dtype) -> None:
        """`model` has the shapes of the weights; it may be on the meta device."""
        self._dtype = dtype
        kind: Any = readers.TENSOR_PROCESSORS.get(reader.architecture, readers.TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._names = _names(reader.architecture, model.config.num_hidden_layers, self._shapes)
        self._tensors = [t for t in reader.tensors if t.name in self._names]
        found = {self._names[t.name] for t in self._tensors}
        if absent := sorted(set(self._shapes) - found - set(model.all_tied_weights_keys)):
            raise ModelUnavailable(f"the file has no tensor for {len(absent)} weights, such as {absent[0]}")

    def write(self, path: Path, report: Callable[[float], None]) -> None:
        """Write all weights; `report` gets the share that is done."""
        sizes = [prod(self._shapes[self._names[t.name]]) * self._dtype.itemsize for t in self._tensors]
        header = self._header(sizes)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            done = reported = expected = 0
            for tensor, size in zip(self._tensors, sizes, strict=True):
                for part in self._parts(tensor):
                    done += file.write(part)
                    if done - reported > sum(sizes) / STEPS:
                        report((reported := done) / sum(sizes))
                expected += size
                if done != expected:
                    raise ModelUnavailable(f"{tensor.name} has another shape than the model's weight")

    def _header(self, sizes: list[int]) -> bytes:
        """The names, types, shapes and places of all tensors, as a safetensors file begins."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, size in zip(self._tensors, sizes, strict=True):
            name = self._names[tensor.name]
            entries[name] = {
                "dtype": _TYPES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(entries).encode()
        return text + b" " * (-len(text) % 8)

    def _parts(self, tensor: Any) -> Iterator[memoryview]:
        """The bytes of one tensor, some rows at a time where its rows do not depend on each other."""
        rows = len(tensor.data)
        step = rows
        if tensor.data.ndim == 2 and ".attn_" not in tensor.name:
            step = max(1, ROWS_AT_ONCE * rows // int(tensor.n_elements))
        for at in range(0, rows, step):
            numbers = gguf.dequantize(tensor.data[at : at + step], tensor.tensor_type)
            numbers = self._processor.process(weights=numbers, name=tensor.name).weights
            made = torch.from_numpy(np.array(numbers, np.float32)).to(self._dtype)
            yield made.reshape(-1).view(torch.uint8).numpy().data


def _names(architecture: str, layers: int, weights: Iterable[str]) -> dict[str, str]:
    """What the file calls a tensor -> the model's weight."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, layers)
    found = {}
    for weight in weights:
        name = known.get_name(weight, try_suffixes=(".weight", ".bias"))
        if name is not None:
            found[name] = weight
    return found
