"""A PEFT adapter directory as a patch. Only safetensors and JSON are read; no code is run or unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from editors.errors import EditError, InvalidEdit, Unsupported
from editors.finetune.adapter import AdapterPatch, Dora, Ia3, Piece
from editors.finetune.peft_format import CONFIG, PREFIX, WEIGHTS
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch

MAX_CONFIG = 2**20
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|ia3_l)(\.default)?(\.weight)?"
)


@dataclass(frozen=True)
class Imported:
    """What an adapter directory holds."""

    method: str
    patch: Patch
    config: dict[str, Any]
    sha256: str  # of its weights file


def read_adapter(lm: LM, folder: Path) -> Imported:
    """Read a LoRA (with rsLoRA, rank patterns, DoRA) or IA3 adapter. Raises EditError that says what is wrong."""
    config = _config(folder)
    data = _weights(folder)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EditError(f"{folder.name}/{WEIGHTS} is damaged: {error}; copy it again") from error
    method, patch = _patch(lm, folder, config, _by_module(lm, folder, tensors))
    return Imported(method, patch, config, hashlib.sha256(data).hexdigest())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file() or path.is_symlink():
        raise InvalidEdit(f"{folder.name} is not a PEFT adapter directory: it has no {CONFIG}")
    try:
        config = json.loads(path.read_bytes()[: MAX_CONFIG + 1])
    except (ValueError, RecursionError) as error:
        raise InvalidEdit(f"{folder.name}/{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "IA3"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise Unsupported(
            f"{folder.name} is an adapter of type {kind!r}; only LORA (with DoRA) and IA3 can be imported"
        )
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise Unsupported(
            f"{folder.name} also carries biases or whole modules (bias, modules_to_save); merge it into a model "
            "instead and start the server with that"
        )
    return config


def _weights(folder: Path) -> bytes:
    path = folder / WEIGHTS
    if not path.is_file() or path.is_symlink():
        pickled = any(folder.glob("*.bin"))
        why = "only a pickled .bin file, which can run code and is never read" if pickled else f"no {WEIGHTS}"
        raise InvalidEdit(f"{folder.name} has {why}; save it with safetensors")
    return path.read_bytes()


def _by_module(lm: LM, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise Unsupported(
                f"{folder.name} has the tensor {key!r}, which is not part of a LoRA or IA3 adapter"
            )
        name = f"{match['module']}.weight"
        try:
            lm.weight(name)
        except AttributeError:
            raise InvalidEdit(
                f"{folder.name} changes {match['module']}, which this model ({lm.arch.family}) does not have; it was "
                "made for another model"
            ) from None
        modules.setdefault(name, {})[match["part"]] = tensor.float()
    if not modules:
        raise InvalidEdit(f"{folder.name}/{WEIGHTS} holds no adapter")
    return modules


def _patch(
    lm: LM, folder: Path, config: dict[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
) -> tuple[str, Patch]:
    info = {"imported": folder.name, "adapter_config": config}
    pieces: dict[str, Piece] = {}
    deltas: dict[str, LowRank] = {}
    for name, tensors in sorted(parts.items()):
        if config["peft_type"] == "IA3":
            pieces[name] = _ia3(lm, folder, name, tensors)
            continue
        if not {"lora_A", "lora_B"} <= set(tensors):
            raise InvalidEdit(f"{folder.name}: {name} lacks lora_A or lora_B")
        right, left = tensors["lora_A"], tensors["lora_B"]
        shape = tuple(lm.weight(name).shape)
        if left.dim() != 2 or right.dim() != 2 or (left.shape[0], right.shape[1]) != shape:
            raise InvalidEdit(
                f"{folder.name}: the adapter of {name} does not have the weight's shape {shape}"
            )
        left = left * _scaling(config, name.removesuffix(".weight"), right.shape[0])
        if config.get("use_dora"):
            pieces[name] = Dora(left, right, tensors["lora_magnitude_vector"].flatten())
        else:
            deltas[name] = LowRank(left.contiguous(), right.contiguous())
    if config["peft_type"] == "IA3":
        return "ia3", AdapterPatch([pieces], info=info)
    if pieces:
        return "lora", AdapterPatch([pieces], info=info)
    return "lora", WeightPatch(deltas, info=info)


def _ia3(lm: LM, folder: Path, name: str, parts: Mapping[str, Tensor]) -> Ia3:
    factors = parts["ia3_l"].flatten()
    if factors.numel() != lm.weight(name).shape[1] or parts["ia3_l"].shape[-1] == 1:
        raise Unsupported(
            f"{folder.name}: the factors of {name} scale its output (attention), but only feed-forward factors, which "
            "scale the input, can be imported"
        )
    return Ia3(factors)


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor by which PEFT multiplies lora_B @ lora_A."""
    alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    try:
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError) as error:
        raise InvalidEdit(f"lora_alpha {alpha!r} of {module} is not a number") from error


def _patterned(patterns: Any, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InvalidEdit(f"alpha_pattern {pattern!r} is not a regular expression: {error}") from error
    return otherwise
