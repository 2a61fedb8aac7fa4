"""The rules by which the doses on one layer become one tensor.

A dose is combined with the earlier ones, in ledger order, by one of these rules:

add         it is added
orthogonal  its component along the sum of the earlier doses of the layer is removed, then it is added
ties        trim, elect sign, merge (Yadav et al. 2023, arXiv 2306.01708): each dose keeps the larger half of
            its entries; for each entry the sign with the greater total wins, and the entries of that sign
            are added (the paper averages them; a sum keeps the meaning of a multiplier)
dare        drop and rescale (Yu et al. 2024, arXiv 2311.03099): a random half of its entries is dropped and
            the others are doubled, then it is added; its name and layer are the random seed
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from editors.constants import assumed
from editors.steering.choices import Combine

DENSITY = assumed(
    0.5,
    "share of a vector's entries that the rules ties and dare keep",
    "the papers keep 0.2 (TIES) and 0.1 to 0.9 (DARE) of weights; not measured for steering vectors",
)


class Combinable(Protocol):
    """What the rules read of a dose."""

    @property
    def name(self) -> str:
        """The name of its vector."""

    @property
    def combine(self) -> Combine:
        """The rule that combines it with earlier doses."""

    @property
    def added(self) -> Mapping[int, Tensor]:
        """Layer -> (d_model,), float32."""


def combined(doses: Sequence[Combinable], layer: int) -> Tensor | None:
    """The sum (d_model,) that the doses add after a layer; None where none acts."""
    total: Tensor | None = None
    ties: list[Tensor] = []
    for dose in doses:
        value = dose.added.get(layer)
        if value is None:
            continue
        if dose.combine == "ties":
            ties.append(value)
            continue
        if dose.combine == "orthogonal" and total is not None and float(total @ total) > 0:
            value = value - (value @ total) / (total @ total) * total
        elif dose.combine == "dare":
            value = _dropped(value, f"{dose.name}/{layer}")
        total = value if total is None else total + value
    if ties:
        merged = _ties(torch.stack(ties))
        total = merged if total is None else total + merged
    return total


def _ties(values: Tensor) -> Tensor:
    """Trim, elect sign and merge: (n, d) -> (d,)."""
    keep = max(1, round(DENSITY * values.shape[1]))
    threshold = values.abs().sort(1, descending=True).values[:, keep - 1 : keep]
    trimmed = values * (values.abs() >= threshold)
    return (trimmed * (trimmed.sign() == trimmed.sum(0).sign())).sum(0)


def _dropped(value: Tensor, seed: str) -> Tensor:
    """Drop random entries of (d,) and rescale the others."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(number)
    mask = torch.rand(value.shape, generator=generator) < DENSITY
    return value * mask / DENSITY
