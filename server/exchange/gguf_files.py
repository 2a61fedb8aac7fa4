"""Edits as GGUF files: a LoRA adapter, and the whole corrected model, for llama.cpp and what is built on it.

Both are written with the `gguf` package, the format's own. llama.cpp names its tensors in its own way and, in the
Llama family, stores the rows of the query and key projections in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editors.model.deltas import LowRank
from editors.model.lm import LM
from server.errors import ServiceError
from server.exchange.results import GgufType

Report = Callable[[float], None]

_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
}
"""transformers' model_type -> the architecture in `gguf.MODEL_ARCH`."""
_ROTARY_PAIRS = ("llama", "mistral")  # their query and key rows are stored with rotary pairs side by side
_FUSED_BY_HEAD = ("gpt_neox",)  # their fused attention projection is stored in another order


class GgufLayout:
    """How llama.cpp names and orders a model's matrices. Raises ServiceError for a family it has no name for."""

    def __init__(self, lm: LM) -> None:
        import gguf

        self.lm, self.config = lm, lm.model.config
        kind = self.config.model_type
        if kind not in _ARCHITECTURES:
            known = ", ".join(sorted(_ARCHITECTURES))
            raise ServiceError(
                f"{lm.arch.family} models cannot be written as GGUF here (possible: {known}); export as merged, and "
                "convert that folder with llama.cpp's convert_hf_to_gguf.py"
            )
        architecture = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
        self.architecture = gguf.MODEL_ARCH_NAMES[architecture]
        self._names = gguf.get_tensor_name_map(architecture, lm.n_layers)

    def name(self, parameter: str) -> str:
        """The tensor's name in GGUF. Raises ServiceError for one that has none."""
        name: str | None = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None or (self.config.model_type in _FUSED_BY_HEAD and "attn_qkv" in name):
            raise ServiceError(f"{parameter} has no counterpart in GGUF; export as lora or as merged")
        return name

    def rows(self, parameter: str, matrix: Tensor) -> Tensor:
        """A matrix (d_out, ...) with its rows in llama.cpp's order."""
        if self.config.model_type not in _ROTARY_PAIRS:
            return matrix
        heads = self.config.num_attention_heads
        if parameter.endswith("k_proj.weight"):
            heads = getattr(self.config, "num_key_value_heads", None) or heads
        elif not parameter.endswith("q_proj.weight"):
            return matrix
        halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
        return halves.swapaxes(1, 2).reshape(matrix.shape)


def write_lora(lm: LM, deltas: Mapping[str, LowRank], about: Mapping[str, Any], path: Path) -> None:
    """Write changes of weights as llama.cpp's LoRA: W + alpha / rank * lora_b @ lora_a, here W + left @ right.

    `about` is kept as text under `errata.about`.
    """
    import gguf

    layout = GgufLayout(lm)
    alpha = max(delta.left.shape[1] for delta in deltas.values())
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for parameter, delta in sorted(deltas.items()):
        name, rank = layout.name(parameter), delta.left.shape[1]
        left = layout.rows(parameter, delta.left) * (
            rank / alpha
        )  # llama.cpp divides by each tensor's own rank
        tensors[f"{name}.lora_a"] = _float32(delta.right)
        tensors[f"{name}.lora_b"] = _float32(left)
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    writer.add_string("errata.about", json.dumps(about, ensure_ascii=False, sort_keys=True))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    _finish(writer)


def write_model(
    lm: LM,
    source: Path,
    changed: Sequence[str],
    kind: GgufType,
    about: Mapping[str, Any],
    path: Path,
    report: Report,
) -> None:
    """Write the live model as GGUF: everything as in the `source` file, with the `changed` weights as they are now.

    Matrices are stored in `kind`, vectors in float32. Tokenizer and settings are the source's own.
    """
    import gguf

    layout = GgufLayout(lm)
    live = {layout.name(parameter): parameter for parameter in changed}
    reader = gguf.GGUFReader(source)
    if missing := live.keys() - {tensor.name for tensor in reader.tensors}:
        raise ServiceError(f"{source} has no {', '.join(sorted(missing))}; export as merged")
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, layout.architecture)
    _copy_fields(reader, writer, kind, about)
    for n, tensor in enumerate(reader.tensors):
        report(n / len(reader.tensors))
        if tensor.name in live:
            parameter = live[tensor.name]
            values = _float32(layout.rows(parameter, lm.weight(parameter)))
        else:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = values.reshape(tuple(int(size) for size in reversed(tensor.shape.tolist())))
        small = values.ndim < 2 or values.shape[-1] % 32
        stored = gguf.GGMLQuantizationType.F32 if small else quantised
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    _finish(writer)


def _copy_fields(reader: Any, writer: Any, kind: GgufType, about: Mapping[str, Any]) -> None:
    """The source's metadata, with the new type and what was edited."""
    import gguf

    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name.startswith(own):
            continue
        part = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=part)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("errata.about", json.dumps(about, ensure_ascii=False, sort_keys=True))


def _float32(matrix: Tensor) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = matrix.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
