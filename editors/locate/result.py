"""The result of every locating method: maps over tokens and layers, the strongest sites, the best layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from editors.locate.traced_prompt import TracedPrompt

MOST_SITES = 12


@dataclass(frozen=True)
class Site:
    """One place in the model, and its effect on the answer."""

    layer: int
    token: int  # index among the prompt's tokens (the decoder's of an encoder-decoder model)
    text: str  # that token
    component: str  # state, mlp, attention, neuron ...
    effect: float
    spread: float | None = None  # standard error over the noise samples
    neuron: int | None = None


@dataclass(frozen=True)
class Located:
    """Where a fact is stored. `maps` hold one grid (tokens, layers) per component, in `unit`."""

    method: str
    traced: TracedPrompt
    maps: dict[str, Tensor]
    unit: str
    sites: list[Site]
    best_layer: int
    confidence: float | None  # share of the noise samples that agree on the best layer
    suggestion: str
    numbers: dict[str, Any] = field(default_factory=dict)


def top_sites(
    traced: TracedPrompt,
    maps: dict[str, Tensor],
    spread: dict[str, Tensor] | None = None,
    count: int = MOST_SITES,
) -> list[Site]:
    """The `count` strongest sites of all maps, strongest first; each component's best is always included."""
    sites: list[Site] = []
    for component, grid in maps.items():
        order = grid.flatten().argsort(descending=True)[:count].tolist()
        layers = grid.shape[1]
        sites += [
            Site(
                layer=i % layers,
                token=i // layers,
                text=traced.labels[i // layers],
                component=component,
                effect=float(grid.flatten()[i]),
                spread=float(spread[component].flatten()[i]) if spread else None,
            )
            for i in order
        ]
    best = {max((s for s in sites if s.component == c), key=lambda s: s.effect) for c in maps}
    rest = sorted((s for s in sites if s not in best), key=lambda s: -s.effect)
    return sorted([*best, *rest[: max(0, count - len(best))]], key=lambda s: -s.effect)
