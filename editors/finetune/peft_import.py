"""A PEFT adapter directory as a patch. Only safetensors and JSON are read; no code is run or unpickled."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from editors.errors import EditError, InvalidEdit, Unsupported
from editors.finetune.adapter import (
    AdapterPatch,
    Dora,
    EmbeddingLora,
    Ia3,
    Ia3Output,
    Lora,
    Piece,
    WholeWeight,
)
from editors.finetune.peft_config import changes_base, read_config
from editors.finetune.peft_format import PREFIX, WEIGHTS
from editors.finetune.peft_initial import with_initial_state_taken_off
from editors.finetune.shared_weights import shares_weight
from editors.model.deltas import Delta, Dense, LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float

_KEY = re.compile(
    r"(?P<module>.+?)\.((?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(\.default)?(?P<what>\.weight|\.bias)?|(?P<base>base_layer\.)?(?P<own>weight|bias))"
)


@dataclass(frozen=True)
class Imported:
    """What an adapter directory holds."""

    method: str
    patch: Patch
    config: dict[str, Any]
    sha256: str  # of its weights file


def read_adapter(lm: LM, folder: Path) -> Imported:
    """Read a LoRA (with its variants) or IA3 adapter for the weights that `lm` has now: the pristine ones.

    Raises EditError that says what is wrong.
    """
    config = read_config(folder)
    data = _weights(folder)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EditError(f"{folder.name}/{WEIGHTS} is damaged: {error}; copy it again") from error
    reader = _Reader(lm, folder, config)
    reader.read(tensors)
    return Imported(reader.method, reader.patch(), config, hashlib.sha256(data).hexdigest())


def _weights(folder: Path) -> bytes:
    path = folder / WEIGHTS
    if not path.is_file() or path.is_symlink():
        pickled = any(folder.glob("*.bin"))
        why = "only a pickled .bin file, which can run code and is never read" if pickled else f"no {WEIGHTS}"
        raise InvalidEdit(f"{folder.name} has {why}; save it with safetensors")
    return path.read_bytes()


class _Reader:
    """Sorts the tensors of one adapter by module, and makes the patch of them."""

    def __init__(self, lm: LM, folder: Path, config: Mapping[str, Any]) -> None:
        self.lm, self.config, self.name = lm, config, folder.name
        self.method = "ia3" if config["peft_type"] == "IA3" else "lora"
        self._parts: dict[str, dict[str, Tensor]] = {}  # weight -> the adapter's tensors for it
        self._deltas: dict[str, Delta] = {}  # what can be written into a weight of its own
        self._pieces: dict[str, Piece] = {}  # what has to act beside the weights

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in all tensors. Raises InvalidEdit or Unsupported that names the first that does not fit."""
        for key, tensor in sorted(tensors.items()):
            self._sort(key, tensor)
        for name, parts in sorted(self._parts.items()):
            self._module(name, parts)
        if not (self._parts or self._deltas or self._pieces):
            raise InvalidEdit(f"{self.name}/{WEIGHTS} holds no adapter")

    def patch(self) -> Patch:
        """A change of weights, or one that acts beside them where one of its modules needs that."""
        info = {"imported": self.name, "adapter_config": dict(self.config)}
        if not self._pieces:
            return WeightPatch(dict(sorted(self._deltas.items())), info=info)
        pieces = dict(self._pieces)
        for name, delta in self._deltas.items():
            pieces[name] = self._beside(name, delta)
        return AdapterPatch([dict(sorted(pieces.items()))], info=info)

    def _beside(self, name: str, delta: Delta) -> Piece:
        """A change of a weight as one that acts beside it."""
        module = self.lm.module(name)
        if name.endswith(".weight") and isinstance(delta, LowRank):
            return (
                EmbeddingLora(delta.left, delta.right)
                if isinstance(module, nn.Embedding)
                else Lora(delta.left, delta.right)
            )
        if name.endswith(".weight") and isinstance(module, nn.Linear | nn.Embedding):
            return WholeWeight(cpu_float(self.lm.weight(name)) + delta.dense())
        raise Unsupported(
            f"{self.name} changes {name}, and other modules in a way that acts beside the weights (DoRA, IA3, a tied "
            "head); both together cannot be imported. Merge it with its own base model instead"
        )

    # --- the tensors of the file ---------------------------------------------------------------

    def _sort(self, key: str, tensor: Tensor) -> None:
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or (match["own"] and re.search(r"\.(lora|ia3)_", key)):
            raise Unsupported(
                f"{self.name} has the tensor {key!r}, which is no part of a LoRA or IA3 adapter"
            )
        module, name = match["module"], f"{match['module']}.weight"
        try:
            self.lm.weight(name)
        except AttributeError:
            raise InvalidEdit(
                f"{self.name} changes {module}, which this model ({self.lm.arch.family}) does not have; it was made "
                "for another model"
            ) from None
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidEdit(f"{self.name}: {key} holds values that are not finite")
        if match["own"]:
            self._own(key, f"{module}.{match['own']}", tensor, bool(match["base"]))
        elif match["what"] == ".bias" and match["part"] != "lora_B":
            raise Unsupported(
                f"{self.name} has the tensor {key!r}, a bias, and no LoRA layer adapts that module"
            )
        else:
            part = "lora_B.bias" if match["what"] == ".bias" else match["part"]
            self._parts.setdefault(name, {})[part] = tensor

    def _own(self, key: str, name: str, tensor: Tensor, is_base: bool) -> None:
        """A whole tensor: a trained bias, a module of modules_to_save, or a copy of the base weight."""
        try:
            stored = self.lm.weight(name)
        except AttributeError:
            raise InvalidEdit(f"{self.name} has {key!r}, but this model has no {name}") from None
        if self.lm.is_transposed(name):
            tensor = tensor.t()
        if tensor.shape != stored.shape:
            raise InvalidEdit(
                f"{self.name}: {key} has the shape {tuple(tensor.shape)}, {name} of this model {tuple(stored.shape)} "
                "(a vocabulary that was resized?); it was made for another model"
            )
        if torch.equal(tensor.to(stored.device, stored.dtype), stored):
            return  # a copy of what the model has
        trained_bias = name.endswith(".bias") and self.config.get("bias", "none") != "none"
        if is_base and not trained_bias:
            raise InvalidEdit(
                f"{self.name}: {key} is not this model's {name}; the adapter was made on another base model"
            )
        if not trained_bias and not self._is_saved(name.rpartition(".")[0]):
            raise Unsupported(
                f"{self.name} has the tensor {key!r}, a whole weight, but neither bias nor modules_to_save name it"
            )
        if shares_weight(self.lm, name):
            self._pieces[name] = WholeWeight(cpu_float(tensor))
        else:
            self._deltas[name] = Dense(cpu_float(tensor) - cpu_float(stored))

    def _is_saved(self, module: str) -> bool:
        """True when modules_to_save names the module."""
        return any(module.endswith(saved) for saved in self.config.get("modules_to_save") or [])

    # --- the modules ---------------------------------------------------------------------------

    def _module(self, name: str, parts: Mapping[str, Tensor]) -> None:
        if name in self._deltas or name in self._pieces:
            raise Unsupported(f"{self.name} has {name} both whole and with an adapter")
        if self.method == "ia3":
            self._pieces[name] = self._ia3(name, parts)
        elif {"lora_embedding_A", "lora_embedding_B"} <= set(parts):
            self._embedding(name, parts)
        elif {"lora_A", "lora_B"} <= set(parts):
            self._linear(name, parts)
        else:
            raise InvalidEdit(
                f"{self.name}: {name} has {', '.join(sorted(parts))} alone; it lacks lora_A or lora_B"
            )

    def _linear(self, name: str, parts: Mapping[str, Tensor]) -> None:
        right, left = parts["lora_A"], parts["lora_B"]
        self._check_shape(name, left, right)
        scaling = _scaling(self.config, name.removesuffix(".weight"), right.shape[0])
        change = LowRank((left * scaling).contiguous(), right.contiguous())
        bias = parts.get("lora_B.bias")
        if changes_base(self.config):
            init = str(self.config["init_lora_weights"])
            change = with_initial_state_taken_off(self.lm, name, change, init, scaling)
        if self.config.get("use_dora"):
            if bias is not None or "lora_magnitude_vector" not in parts:
                what = "lora_B.bias beside DoRA" if bias is not None else "no lora_magnitude_vector"
                raise Unsupported(f"{self.name}: {name} has {what}, which cannot be imported")
            self._pieces[name] = Dora(change.left, change.right, parts["lora_magnitude_vector"].flatten())
        elif bias is not None or shares_weight(self.lm, name):
            self._pieces[name] = Lora(change.left, change.right, None if bias is None else bias * scaling)
        else:
            self._deltas[name] = change

    def _embedding(self, name: str, parts: Mapping[str, Tensor]) -> None:
        if self.config.get("use_dora") or changes_base(self.config):
            raise Unsupported(
                f"{self.name} adapts the embedding {name} (lora_embedding_A) with use_dora or init_lora_weights="
                f"{self.config.get('init_lora_weights')!r}, which cannot be imported"
            )
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]  # (r, vocabulary), (d_model, r)
        self._check_shape(name, a.t(), b.t())
        scaling = _scaling(self.config, name.removesuffix(".weight"), a.shape[0])
        rows, right = a.t().contiguous(), (b.t() * scaling).contiguous()
        if shares_weight(self.lm, name):
            self._pieces[name] = EmbeddingLora(rows, right)
        else:
            self._deltas[name] = LowRank(rows, right)

    def _check_shape(self, name: str, left: Tensor, right: Tensor) -> None:
        shape = self.lm.shape(name)
        fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
        if not fits or (left.shape[0], right.shape[1]) != shape:
            raise InvalidEdit(f"{self.name}: the adapter of {name} does not have the weight's shape {shape}")

    def _ia3(self, name: str, parts: Mapping[str, Tensor]) -> Piece:
        factors, (d_out, d_in) = parts["ia3_l"], self.lm.shape(name)
        if tuple(factors.shape) == (d_out, 1):
            return Ia3Output(factors.flatten())
        if tuple(factors.shape) == (1, d_in):
            return Ia3(factors.flatten())
        raise InvalidEdit(
            f"{self.name}: the factors of {name} have the shape {tuple(factors.shape)}, not ({d_out}, 1) or (1, {d_in})"
        )


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
