"""Contrastive activation addition (CAA)."""

from __future__ import annotations

from torch import Tensor

from editors.steering.directions import mean_difference
from editors.steering.method import ResidualMethod


class Caa(ResidualMethod):
    """The mean difference of the two sides' states."""

    name = "caa"
    description = "mean difference of the pairs (start here)"
    when = "You have pairs of texts that differ in one trait. Fast and steady."
    source = "Rimsky et al. 2024, arXiv 2312.06681, section 3"

    def direction(self, differences: Tensor) -> Tensor:
        return mean_difference(differences)
