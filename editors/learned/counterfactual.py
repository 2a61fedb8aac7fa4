"""SERAC's counterfactual model: the model itself with a small adapter, given the remembered edit before the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from editors.errors import EditError
from editors.model.activations import hooked
from editors.model.architecture import Architecture
from editors.model.lm import LM


@dataclass(frozen=True)
class AdaptedWeight:
    """Name and shape of one weight with an adapter."""

    parameter: str
    d_out: int
    d_in: int


class CounterfactualAdapter(nn.Module):
    """Low-rank changes of linear modules, added by hooks: W x + B A x. B is zero at the start."""

    def __init__(self, sites: Sequence[AdaptedWeight], rank: int, seed: int = 0) -> None:
        super().__init__()
        self.sites, self.rank = list(sites), rank
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(rank, s.d_in, generator=generator) / s.d_in**0.5) for s in sites
        )
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(s.d_out, rank)) for s in sites)

    @contextmanager
    def on(self, lm: LM) -> Iterator[None]:
        """Run the model with the adapter."""

        def hook_for(a: Tensor, b: Tensor) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                return output.add(linear(linear(args[0].float(), a), b).to(output.dtype))

            return hook

        handles = []
        for site, a, b in zip(self.sites, self.a, self.b, strict=True):
            device = lm.place(site.parameter)
            handles.append(
                lm.module(site.parameter).register_forward_hook(hook_for(a.to(device), b.to(device)))
            )
        with hooked(handles):
            yield

    def check(self, lm: LM) -> None:
        """Raise EditError when the adapter was trained for another model."""
        for site in self.sites:
            if (site.d_out, site.d_in) != lm.shape(site.parameter):
                raise EditError(
                    f"the adapter was trained for another model: {site.parameter} has another shape; run "
                    'train_editor(method="serac") for this model'
                )


def _paths(arch: Architecture, layer: nn.Module) -> tuple[str, ...]:
    mlp_in, mlp_out = arch.mlp_of(layer)
    return (arch.mixer_out(layer), *mlp_in, mlp_out)


def adapter_sites(lm: LM, first: int) -> list[AdaptedWeight]:
    """The attention output, MLP input and MLP output projections of the decoder layers from `first` on."""
    arch = lm.arch
    names = [
        f"{arch.layers}.{i}.{path}.weight"
        for i in range(first, lm.n_layers)
        for path in _paths(arch, lm.layers[i])
    ]
    return [AdaptedWeight(name, *lm.shape(name)) for name in names]
