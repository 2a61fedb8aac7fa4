"""The first principal component of the differences, as in representation engineering."""

from __future__ import annotations

from torch import Tensor

from editors.steering.directions import first_component
from editors.steering.method import ResidualMethod


class Pca(ResidualMethod):
    """The direction along which the pairs differ most."""

    name = "pca"
    description = "their first component"
    when = "Single pairs are noisy, and the mean is pulled aside by a few of them."
    source = "Zou et al. 2023, arXiv 2310.01405, section 3.1"

    def direction(self, differences: Tensor) -> Tensor:
        return first_component(differences)
