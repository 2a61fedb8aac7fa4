"""The weights of a loaded model by name and place, and other weights for a while."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editors.errors import InvalidEdit
from editors.model.architecture import Architecture, architecture_of, resolve
from editors.model.deltas import Delta, rebuilt
from editors.model.probe import check_head, probed


class Weights:
    """A model's parameters as (d_out, d_in) matrices, whichever way its family stores them.

    Every parameter is frozen and the model is in evaluation mode from here on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.arch: Architecture = probed(model, architecture_of(model))
        self.layers: list[nn.Module] = list(resolve(model, self.arch.layers).children())
        self.d_model: int = self.model.config.get_text_config().hidden_size
        check_head(self.model, self.arch, self.head)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def is_seq2seq(self) -> bool:
        return self.arch.is_seq2seq

    @property
    def device(self) -> torch.device:
        """Where inputs go. Results come back to it, also of a model that is spread over several devices."""
        device: torch.device = resolve(self.model, self.arch.embed).weight.device  # type: ignore[assignment]
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def base_model(self) -> Any:
        """The model without its language-model head, where that is a module of its own (T5 has none)."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    # --- by name -------------------------------------------------------------------------------

    def mlp_out(self, layer: int) -> str:
        """Parameter name of a layer's MLP output projection. Raises InvalidEdit for a layer that does not exist."""
        if not 0 <= layer < self.n_layers:
            raise InvalidEdit(f"layer {layer} does not exist; this model has layers 0 to {self.n_layers - 1}")
        return f"{self.arch.layers}.{layer}.{self.arch.mlp_out}.weight"

    def module(self, parameter: str) -> nn.Module:
        """The module that holds a parameter."""
        return resolve(self.model, parameter.rpartition(".")[0])

    def weight(self, parameter: str) -> Tensor:
        """A (d_out, d_in) view of a linear weight, whichever way the family stores it."""
        weight: Tensor = self.model.get_parameter(parameter).data
        return weight.t() if self.is_transposed(parameter) else weight

    def is_transposed(self, parameter: str) -> bool:
        """True where the family stores (d_in, d_out)."""
        return isinstance(self.module(parameter), Conv1D)

    # --- other weights for a while -------------------------------------------------------------

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Make a (d_out, d_in) tensor the live weight, stored the way the family does."""
        stored = tensor.t() if self.is_transposed(parameter) else tensor
        self.model.get_parameter(parameter).data = stored

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other (d_out, d_in) weights; the former tensors themselves are put back at the end."""
        former = {name: self.model.get_parameter(name).data for name in tensors}
        try:
            for name, tensor in tensors.items():
                self.put(name, tensor)
            yield
        finally:
            for name, data in former.items():
                self.model.get_parameter(name).data = data

    @contextmanager
    def patched(self, deltas: Mapping[str, Sequence[Delta]]) -> Iterator[None]:
        """Run with deltas on top of the live weights; nothing stays."""
        with self.swapped({name: rebuilt(self.weight(name), ds) for name, ds in deltas.items()}):
            yield

    # --- the head ------------------------------------------------------------------------------

    def head(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Final norm and language-model head: (..., d_model) -> logits (..., vocabulary).

        `weight`: used in place of the head's own, for example a copy in another precision.
        """
        norm = resolve(self.model, self.arch.norm)
        hidden = norm(hidden) if norm is not None else hidden  # OPT-350m has none
        if self.arch.project_out is not None:
            hidden = resolve(self.model, self.arch.project_out)(hidden)
        if self.arch.scales_head_input:
            hidden = hidden * self.d_model**-0.5
        return self.unembed(hidden, weight)

    def unembed(self, states: Tensor, weight: Tensor | None = None) -> Tensor:
        """The last part of `head`: logits of states that are past the final norm, soft-capped where the family is."""
        head: Any = resolve(self.model, self.arch.head)
        if weight is None:
            logits: Tensor = head(states)
        else:
            logits = nn.functional.linear(states.to(weight.dtype), weight).float()
            logits = logits + (0 if head.bias is None else head.bias)
        logits = logits.to(self.device)  # of a model spread over several devices, the last one has the head
        logits = logits if self.arch.logit_scale == 1 else logits * self.arch.logit_scale
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, dtype and shape."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()
