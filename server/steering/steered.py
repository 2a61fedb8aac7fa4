"""The model with one dose of a vector, for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from editors.constants import limit
from editors.model.lm import LM, Prompt
from editors.steering.choices import Combine
from editors.steering.vector import SteeringVector
from server.steering.stored import active_dose
from server.transaction.host import ActivePatch
from server.transaction.stack import without
from server.transaction.workspace import Workspace

STRONGEST_MEASURED = limit(
    3.0,
    "largest multiplier that calibrate_steering and evaluate_steering try, in mean hidden norms",
    "time: far beyond useful doses; a larger one is refused",
)


@dataclass(frozen=True)
class SteeredModel:
    """A model and the vector whose doses are measured on it."""

    workspace: Workspace
    vector: SteeringVector
    name: str
    combine: Combine
    prompt_tokens: bool

    @property
    def lm(self) -> LM:
        return self.workspace.lm

    @contextmanager
    def at(self, multiplier: float) -> Iterator[None]:
        """Steer the model by this dose, in addition to what else is active. 0 leaves it as it is."""
        with self.vector.apply(self.lm, multiplier, combine=self.combine, prompt_tokens=self.prompt_tokens):
            yield


def stack_without(workspace: Workspace, name: str) -> list[ActivePatch]:
    """The active patches without the present dose of a vector."""
    current = active_dose(workspace, name)
    return without(workspace, [current] if current else [])[0]


def texts_of(lm: LM, prompts: Sequence[Prompt], tokens: int) -> list[str]:
    """What the model writes after each prompt."""
    return [g.text.strip() for g in lm.generate(prompts, tokens)]
