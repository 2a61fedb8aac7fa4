"""The base of all steering methods: they compute a vector from contrasting texts and do not change the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from editors.errors import InvalidEdit
from editors.model.lm import LM
from editors.progress import ReportProgress
from editors.steering.choices import Positions
from editors.steering.directions import (
    Separation,
    answer_groups,
    fit_direction,
    mean_shift,
    separations,
)
from editors.steering.layers import best_layers, check_layers
from editors.steering.pairs import Pair, check_pairs
from editors.steering.states import Side, pair_states, sides_of
from editors.steering.vector import SteeringVector, new_vector


@dataclass(frozen=True)
class VectorInput:
    """The input of a steering method: pairs or prompts, whichever the method takes.

    `layers` are those that the vector acts after (None: chosen by separation). `positions` are the tokens at
    which states are read.
    """

    pairs: Sequence[Pair] | None = None
    positive_prompt: str | None = None
    negative_prompt: str | None = None
    layers: Sequence[int] | None = None
    positions: Positions = "answer"
    name: str = "vector"


@dataclass(frozen=True)
class ComputedVector:
    """A vector, and how well each layer separates the two sides. Maps on the output have no layers."""

    vector: SteeringVector
    pairs: int
    shifts: list[float] = field(default_factory=list)  # per layer: see directions.mean_shift
    separations: list[Separation] | None = None  # per layer, on held-out pairs; None for a single pair


class SteeringMethod(ABC):
    """One way to compute a steering vector. The table of them is editors/steering/methods.py."""

    name: ClassVar[str]
    description: ClassVar[str]  # what it does; the tool's schema shows it
    when: ClassVar[str]
    source: ClassVar[str]
    takes: ClassVar[Literal["pairs", "prompts"]] = "pairs"

    def sides(self, lm: LM, given: VectorInput) -> list[tuple[Side, Side]]:
        """The positive and negative texts that are compared. Raises InvalidEdit for input it does not take."""
        if given.positive_prompt or given.negative_prompt:
            raise InvalidEdit(
                f"method {self.name} takes pairs, not positive_prompt and negative_prompt; leave these two out"
            )
        pairs = list(given.pairs or [])
        check_pairs(pairs)
        return sides_of(lm, pairs)

    @abstractmethod
    def compute(self, lm: LM, given: VectorInput, report: ReportProgress) -> ComputedVector:
        """The vector of a pristine model. `report(fraction, message)` may raise to cancel; raises InvalidEdit."""

    def info(self, given: VectorInput, pairs: int) -> dict[str, Any]:
        """What is kept in the vector's file beside its tensors."""
        return {"name": given.name, "positions": given.positions, "pairs": pairs}


class ResidualMethod(SteeringMethod):
    """A method that gives one direction of the residual stream per layer."""

    @abstractmethod
    def direction(self, differences: Tensor) -> Tensor:
        """Differences of the pairs' states (n, layers, d_model) -> unit vectors (layers, d_model)."""

    def compute(self, lm: LM, given: VectorInput, report: ReportProgress) -> ComputedVector:
        layers = None if given.layers is None else check_layers(lm.n_layers, given.layers)
        sides = self.sides(lm, given)
        states = pair_states(lm, sides, given.positions, report)
        groups = answer_groups(given.pairs or ())
        separation = separations(states, self.direction, groups)
        shifts = mean_shift(states).tolist()
        vector = new_vector(
            self.name,
            layers or best_layers([s.d_prime for s in separation] if separation else shifts),
            fit_direction(states.differences, self.direction, groups),
            states.norms,
            self.info(given, len(sides)),
        )
        return ComputedVector(vector, len(sides), shifts, separation)
