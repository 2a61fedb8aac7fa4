"""The model with one dose of a vector, for measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from editors.model.lm import LM, Prompt
from editors.steering.choices import Combine
from editors.steering.stack import dose_of
from editors.steering.vector import SteeringVector
from server.steering.stored import active_dose
from server.transaction.host import ActivePatch
from server.transaction.stack import without
from server.transaction.workspace import Workspace

TEXT_TOKENS = 24  # of every generated text
STRONGEST_MEASURED = 3.0  # the largest multiplier that is measured


@dataclass(frozen=True)
class Measure:
    """A vector, and the model without it."""

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
        """The model with this dose on top of whatever else acts; 0 is the model without it."""
        if multiplier == 0:
            yield
            return
        detach = dose_of(self.name, self.vector, multiplier, self.combine, self.prompt_tokens).attach(self.lm)
        try:
            yield
        finally:
            detach()


def stack_without(workspace: Workspace, name: str) -> list[ActivePatch]:
    current = active_dose(workspace, name)
    return without(workspace, [current] if current else [])[0]


def texts_of(lm: LM, prompts: Sequence[Prompt], tokens: int) -> list[str]:
    return [g.text.strip() for g in lm.generate(prompts, tokens)]
