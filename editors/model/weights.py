"""The weights of a loaded model by name and place, and other weights for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editors.errors import EditError, InvalidEdit
from editors.model.architecture import Architecture, resolve
from editors.model.deltas import Delta, rebuilt
from editors.model.experts import OUT, StackedExperts, refuse_other_experts
from editors.model.probe import check_head, probed
from editors.model.quantised import (
    QuantisedLinear,
    SideCar,
    hash_tensor,
    hashes_of,
    quantisation,
    quantised_linear,
    quantised_modules,
    settle,
)
from editors.model.recognise import architecture_of

__all__ = ["Live", "Weights", "hash_tensor"]

Live = Tensor | SideCar
"""What a weight is now: the stored tensor, or of a quantised one what acts beside it."""


class Weights:
    """A model's parameters as (d_out, d_in) matrices, whichever way its family stores them.

    Every parameter is frozen and the model is in evaluation mode from here on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        settle(model)
        self.experts: dict[str, StackedExperts] = {}  # by the name of the experts side by side
        for name, module in list(model.named_modules()):
            if name.endswith(".experts") and getattr(module, "down_proj", None) is not None:
                refuse_other_experts(name, module)
                self.experts[f"{name}.{OUT}.weight"] = StackedExperts(module)
        self.quantisation: str | None = quantisation(model)
        self.arch: Architecture = probed(model, architecture_of(model))
        self.layers: list[nn.Module] = list(resolve(model, self.arch.layers).children())
        self.d_model: int = self.model.config.get_text_config().hidden_size * self.arch.streams
        self.quantised: dict[str, QuantisedLinear] = {
            f"{name}.weight": quantised_linear(module)
            for name, module in quantised_modules(model)
            if f"{name}.weight" not in self.experts
        }
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
    def precision(self) -> str:
        """The type of the weights: "float32" say, or "nf4 in float32" where it computes in that with quantised ones."""
        dtype = str(self.dtype).removeprefix("torch.")
        return dtype if self.quantisation is None else f"{self.quantisation} in {dtype}"

    @property
    def context(self) -> int | None:
        """The most tokens that the model has positions for; None if its config has no limit."""
        most: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return most

    @cached_property
    def parameters(self) -> int:
        """The number of parameters, which no edit changes."""
        plain: int = sum(p.numel() for p in self._plain().values())
        return plain + sum(q.shape[0] * q.shape[1] for q in self.quantised.values())

    def _plain(self) -> dict[str, Tensor]:
        """What is stored as it is used, by name: all but the weights of quantised layers."""
        named = self.named_by_edits({name: p.data for name, p in self.model.named_parameters()})
        return {
            name: tensor
            for name, tensor in named.items()
            if name.endswith(".bias") or f"{name.rpartition('.')[0]}.weight" not in self.quantised
        }

    def named_by_edits(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their stored names, with stacked experts under the name that edits use."""
        stored = {f"{name.removesuffix(f'.{OUT}.weight')}.down_proj": name for name in self.experts}
        return {stored.get(name, name): tensor for name, tensor in tensors.items()}

    @property
    def base_model(self) -> Any:
        """The model without its language-model head, where that is a module of its own (T5 has none)."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @property
    def edits_experts(self) -> bool:
        """Whether edits of some layers go to the experts that a router chooses."""
        return any(self.mlp_out(i) in self.experts for i in range(self.n_layers))

    # --- by name -------------------------------------------------------------------------------

    def mlp_out(self, layer: int) -> str:
        """Parameter name of a layer's MLP output projection. Raises InvalidEdit for a layer that does not exist."""
        if not 0 <= layer < self.n_layers:
            raise InvalidEdit(f"layer {layer} does not exist; this model has layers 0 to {self.n_layers - 1}")
        return f"{self.arch.layers}.{layer}.{self.arch.mlp_of(self.layers[layer])[1]}.weight"

    def mlp_in(self, layer: int) -> list[str]:
        """Parameter names of a layer's MLP input projections: gate and up, both in one, or one without a gate."""
        self.mlp_out(layer)  # refuses a layer that does not exist
        paths = self.arch.mlp_of(self.layers[layer])[0]
        return [f"{self.arch.layers}.{layer}.{path}.weight" for path in paths]

    def module(self, parameter: str) -> nn.Module:
        """The module that holds a parameter."""
        return resolve(self.model, parameter.rpartition(".")[0])

    def weight(self, parameter: str) -> Tensor:
        """A (d_out, d_in) view of a linear weight, whichever way the family stores it.

        Of a quantised weight it is a new float32 tensor: the matrix that the forward pass multiplies by. Of experts
        it is a copy, with their matrices side by side.
        """
        if parameter in self.experts:
            return self.experts[parameter].joined(self.experts[parameter].module.down_proj.data)
        if parameter in self.quantised:
            return self.quantised[parameter].weight(self.dtype)
        weight: Tensor = self.model.get_parameter(parameter).data
        return weight.t() if self.is_transposed(parameter) else weight

    def shape(self, parameter: str) -> tuple[int, int]:
        """(d_out, d_in) of a linear weight. Raises EditError for a parameter that is no matrix."""
        if found := self.quantised.get(parameter) or self.experts.get(parameter):
            return found.shape
        weight = self.weight(parameter)
        if weight.dim() != 2:
            raise EditError(f"{parameter} is no matrix, but of shape {tuple(weight.shape)}")
        rows, columns = weight.shape
        return rows, columns

    def place(self, parameter: str) -> torch.device:
        """The device that a weight is on."""
        found = self.quantised.get(parameter) or self.experts.get(parameter)
        device: torch.device = self.model.get_parameter(parameter).device if found is None else found.device
        return device

    def is_transposed(self, parameter: str) -> bool:
        """True where the family stores (d_in, d_out)."""
        return isinstance(self.module(parameter), Conv1D)

    # --- as they are stored ---------------------------------------------------------------------

    def live(self, parameter: str) -> Live:
        """What a weight is now, as `set_live` takes it: the tensor itself, or the side-car of a quantised weight."""
        if parameter in self.quantised:
            return self.quantised[parameter].side
        data: Tensor = self._stored(parameter).data
        return data

    def _stored(self, parameter: str) -> Any:
        if parameter in self.experts:
            return self.experts[parameter].module.down_proj
        return self.model.get_parameter(parameter)

    def set_live(self, parameter: str, live: Live) -> None:
        """Set a weight to a value of `live`. For a plain weight nothing is computed or copied."""
        if isinstance(live, SideCar):
            self.quantised[parameter].side = live
        else:
            self._stored(parameter).data = live

    def rebuilt(self, parameter: str, base: Live, deltas: Sequence[Delta]) -> Live:
        """The weight with deltas on top of `base`, as `set_live` takes it."""
        if isinstance(base, SideCar):
            return SideCar((*base.deltas, *deltas))
        return self.as_stored(parameter, rebuilt(self.as_matrix(parameter, base), deltas))

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight as it is now."""
        found = hashes_of(self._plain())
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            bases = pool.map(QuantisedLinear.hash, self.quantised.values())
            for (name, quantised), base in zip(self.quantised.items(), bases, strict=True):
                found[name] = quantised.side.digest(base)
        return found

    # --- other weights for a while -------------------------------------------------------------

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Make a (d_out, d_in) tensor the live weight, stored the way the family does. Not for quantised weights."""
        self.set_live(parameter, self.as_stored(parameter, tensor))

    def as_matrix(self, parameter: str, stored: Tensor) -> Tensor:
        """(d_out, d_in) from a tensor as the family stores it: a view, but of experts a copy."""
        if parameter in self.experts:
            return self.experts[parameter].joined(stored)
        return stored.t() if self.is_transposed(parameter) else stored

    def as_stored(self, parameter: str, tensor: Tensor) -> Tensor:
        """The inverse of `as_matrix`. Raises EditError for a quantised weight, which nothing is written into."""
        if parameter in self.quantised:
            raise EditError(f"{parameter} is quantised: a change of it acts beside it, as `patched` makes it")
        if parameter in self.experts:
            return self.experts[parameter].stacked(tensor)
        return tensor.t() if self.is_transposed(parameter) else tensor

    @contextmanager
    def held(self, lives: Mapping[str, Live]) -> Iterator[None]:
        """Run with other weights, as `set_live` takes them; the former ones themselves are put back at the end."""
        former = {name: self.live(name) for name in lives}
        try:
            for name, live in lives.items():
                self.set_live(name, live)
            yield
        finally:
            for name, live in former.items():
                self.set_live(name, live)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other (d_out, d_in) weights; the former tensors themselves are put back at the end."""
        with self.held({name: self.as_stored(name, t) for name, t in tensors.items()}):
            yield

    @contextmanager
    def patched(self, deltas: Mapping[str, Sequence[Delta]]) -> Iterator[None]:
        """Run with deltas on top of the live weights; nothing stays."""
        with self.held({name: self.rebuilt(name, self.live(name), ds) for name, ds in deltas.items()}):
            yield

    # --- the head ------------------------------------------------------------------------------

    def head(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Final norm and language-model head: (..., d_model) -> logits (..., vocabulary).

        `weight`: used in place of the head's own, for example a copy in another precision.
        """
        norm = resolve(self.model, self.arch.norm)
        hidden = hidden if self.arch.streams_out is None else self._one_stream(hidden)
        hidden = norm(hidden) if norm is not None else hidden  # OPT-350m has none
        if self.arch.project_out is not None:
            hidden = resolve(self.model, self.arch.project_out)(hidden)
        if self.arch.scales_head_input:
            hidden = hidden * self.d_model**-0.5
        return self.unembed(hidden, weight)

    def _one_stream(self, states: Tensor) -> Tensor:
        """The mean of all streams (..., streams d) -> (..., d), each but the first projected and made as long as it.

        Alternating updates: Baykal et al., NeurIPS 2023, arXiv 2301.13310; as Gemma 3n joins them.
        """
        active, *others = states.unflatten(-1, (self.arch.streams, -1)).unbind(-2)
        size = active.square().mean(-1, keepdim=True).sqrt()
        projections: Any = resolve(self.model, str(self.arch.streams_out))
        found = [active]
        for project, stream in zip(projections, others, strict=True):
            new = project(stream.to(project.weight.dtype)).to(active.dtype)
            found.append(new * size / new.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt())
        return torch.stack(found).mean(0)

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
