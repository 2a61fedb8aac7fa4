"""The interface of every editing method: a typed request in, a patch out, the model unchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from editors.advice import Advice, Evidence, Preset, Problem, Remedy
from editors.edit import Edit
from editors.errors import EditError, NotReady
from editors.forms.form import Material
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import TRAINED_ON, Patch, trained_prompts
from editors.training_spec import TrainingSpec


class Params(BaseModel):
    """Base of a method's parameters; None means "by this model's shape" (see `Editor.resolve`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Prior:
    """An active patch that was there before, oldest first; `rows` are its active rows."""

    method: str
    patch: Patch
    rows: tuple[int, ...]


def _nothing(fraction: float, message: str) -> None:
    return None


@dataclass(frozen=True)
class EditContext:
    """What a method may use besides the model: statistics, earlier patches, and lines to the caller.

    `report(fraction, message)` may raise Cancelled. `trained` holds what train_editor made for this
    very model; None where nothing is kept. `materials` has one entry for each edit, or none at all: the forms to
    learn and the facts to hold. What its `measured` and `siblings` name is for judging only, never for training.
    """

    statistics: Statistics
    prior: Sequence[Prior] = ()
    report: Callable[[float, str], None] = field(default=_nothing)
    trained: Path | None = None
    materials: Sequence[Material] = ()


P = TypeVar("P", bound=Params)


class Editor(ABC, Generic[P]):
    """One editing method. `compute` leaves the model bit-identical; only the host applies patches."""

    name: ClassVar[str]
    family: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    when: ClassVar[str]
    cost: ClassVar[str]
    kind: ClassVar[str] = "weight"
    batch: ClassVar[bool] = False
    long_answers: ClassVar[bool] = False
    """Whether it can make the model say a target of a sentence or a paragraph."""
    holds_others: ClassVar[bool] = True
    """Whether `compute` may use the subject's other facts that the model was asked for (`Material.held`)."""
    stronger: ClassVar[tuple[Remedy, ...]] = ()
    """What to change when an edit is too weak, the best first."""
    gentler: ClassVar[tuple[Remedy, ...]] = ()
    """What to change when an edit moves too much else, the best first."""
    published: ClassVar[Preset | None] = None
    """The paper's parameters, for methods whose defaults differ from them."""
    training: ClassVar[TrainingSpec | None] = None
    """How the method is trained, for those that must be before they can be used."""
    params: type[P]

    def resolve(self, lm: LM, params: P) -> P:
        """Fill in what was left to the model's shape; raises InvalidEdit for values it cannot have."""
        return params

    def supports(self, lm: LM) -> str | None:
        """None, or why this method cannot work on this model and what would."""
        return None

    def layers_needed(self, lm: LM, params: P) -> Sequence[int]:
        """Layers whose second moments `compute` will ask for."""
        return ()

    def inputs_needed(self, lm: LM, params: P) -> Sequence[int]:
        """Layers of whose MLP inputs on ordinary text `compute` will ask for (`Statistics.inputs`)."""
        return ()

    def ensure_statistics(
        self, lm: LM, params: P, statistics: Statistics, progress: Callable[[float, str], None] = _nothing
    ) -> None:
        """Compute what `compute` will ask of `statistics` and is missing there. The model must be the pristine one."""
        statistics.ensure(lm, self.layers_needed(lm, params), progress)
        statistics.ensure_inputs(lm, self.inputs_needed(lm, params), progress)

    def needs(self, lm: LM, context: EditContext) -> list[str]:
        """What is still missing before it can be used, each with the call that makes it."""
        return []

    def require(self, lm: LM, context: EditContext) -> None:
        """Raise NotReady, naming the call that makes what is missing."""
        if needs := self.needs(lm, context):
            raise NotReady(f"{self.name} needs {needs[0]}")

    @abstractmethod
    def compute(self, lm: LM, edits: Sequence[Edit], params: P, context: EditContext) -> Patch:
        """The patch that makes the edits, one row per edit. Raises EditError; mutates nothing."""

    def trained_on(self, edits: Sequence[Edit], params: P) -> list[list[str]]:
        """For each edit, the prompts `compute` trains on besides the edit's own.

        A method that trains on more than the edit's own prompt overrides this and records the result in its patch
        (`with_training`). Generality and locality leave these prompts out.
        """
        return [[] for _ in edits]

    def trained_prompts(self, patch: Patch, edits: Sequence[Edit], params: P) -> frozenset[str]:
        """All prompts a patch of this method was trained on besides its edits' own.

        Patches of version 0.1.0 do not record them. For those they are computed from the edits and parameters.
        What an imported adapter was trained on is not known.
        """
        if TRAINED_ON in patch.info or "imported" in patch.info:
            return trained_prompts(patch)
        return frozenset(prompt for each in self.trained_on(edits, params) for prompt in each)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: Statistics) -> Patch:
        """The patch as if only these rows had been in the batch; the same input always gives the same bits."""
        raise EditError(f"a batch of {self.name} cannot be split; revert all of its edits together")

    def suits(self, lm: LM) -> bool:
        """Whether `method="auto"` may choose it on this model; False where measurements speak against it."""
        return True

    @property
    def exportable(self) -> bool:
        """True when its edits are changes of weights, which any other program can load."""
        return self.kind == "weight"

    def hint(self, lm: LM, params: P, problem: Problem, evidence: Evidence | None = None) -> Advice:
        """What to try after an edit with `params` was too weak or too strong. `evidence`: by which prompts."""
        if evidence is not None and (fitted := self.fitted(lm, params, problem, evidence)) is not None:
            return fitted
        current = self.resolve(lm, params).model_dump()
        remedies = self.stronger if problem == "too_weak" else self.gentler
        own = evidence is not None and bool(evidence.unsaid)
        for remedy in remedies if not own else [r for r in remedies if not r.widens]:
            value = remedy.apply(current[remedy.parameter])
            if value != current[remedy.parameter] and self._accepts(lm, current | {remedy.parameter: value}):
                text = f"params.{remedy.parameter}={value!r} {remedy.effect}"
                return Advice(text, {remedy.parameter: value})
        return self.no_advice()

    def fitted(self, lm: LM, params: P, problem: Problem, evidence: Evidence) -> Advice | None:
        """Advice derived from the prompts themselves; None if the method has only its remedies."""
        return None

    def no_advice(self) -> Advice:
        """The advice if no parameter helps."""
        return Advice(
            f"no parameter of {self.name} is known to help; try another method (list_methods shows them)"
        )

    def _accepts(self, lm: LM, values: dict[str, Any]) -> bool:
        try:
            self.resolve(lm, self.params.model_validate(values))
        except (ValidationError, EditError):
            return False
        return True

    def schema(self, lm: LM | None) -> dict[str, Any]:
        """JSON schema of the parameters, with this model's defaults."""
        schema: dict[str, Any] = self.params.model_json_schema()
        if lm is not None and self.supports(lm) is None:
            for name, value in self.resolve(lm, self.params()).model_dump().items():
                schema["properties"][name]["default"] = value
        if self.published is not None:
            preset = {"params": dict(self.published.params), "source": self.published.source}
            schema["x-presets"] = {"published": preset}
        return schema
