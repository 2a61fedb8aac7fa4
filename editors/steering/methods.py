"""The table of steering methods. A new one is a file with its class, one line here, and its name in choices.py."""

from __future__ import annotations

from collections.abc import Sequence

from editors.errors import InvalidEdit
from editors.model.lm import LM
from editors.steering.caa import Caa
from editors.steering.lm_steer import LmSteer
from editors.steering.method import SteeringMethod, VectorInput
from editors.steering.pairs import Pair
from editors.steering.pca import Pca
from editors.steering.prompt import InstructionVector
from editors.steering.vector import SteeringVector

STEERING_METHODS: dict[str, SteeringMethod] = {
    method.name: method for method in (Caa(), Pca(), LmSteer(), InstructionVector())
}


def steering_method(name: str) -> SteeringMethod:
    """A method of the table. Raises InvalidEdit naming those there are."""
    if name not in STEERING_METHODS:
        raise InvalidEdit(
            f"steering method {name!r} is not known; the methods are {', '.join(STEERING_METHODS)}"
        )
    return STEERING_METHODS[name]


def compute_vector(
    lm: LM, pairs: Sequence[Pair], method: str = "caa", layers: Sequence[int] | None = None
) -> SteeringVector:
    """A steering vector from pairs of contrasting texts; the model is not changed.

    Args:
        lm: the model, without edits or steering that the vector should not contain.
        pairs: texts that differ in the trait; ten or more give a steady direction.
        method: a name of STEERING_METHODS that takes pairs.
        layers: the layers it acts after, from 0; None: those that separate held-out pairs best.

    Raises:
        InvalidEdit: for pairs, a method or layers that cannot be used.
    """
    given = VectorInput(pairs=pairs, layers=layers)
    return steering_method(method).compute(lm, given, lambda fraction, message: None).vector
