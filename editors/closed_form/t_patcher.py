"""Transformer-Patcher: one fact written into neurons of its own (Huang et al., ICLR 2023, arXiv 2301.09785)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from editors.advice import Remedy
from editors.closed_form.answer_openings import (
    MOST,
    PROBABLE,
    AnswerOpening,
    also_asked,
    answer_opening,
    probabilities,
    with_answers,
)
from editors.closed_form.contexts import TargetRow
from editors.closed_form.defaults import existing_layer, seq2seq_refusal
from editors.closed_form.detectors import OrdinarySpace
from editors.closed_form.keys import opening_rows
from editors.closed_form.later_inputs import LaterInputs
from editors.closed_form.material_rows import with_material
from editors.closed_form.neurons import (
    NEURONS,
    MLPNeurons,
    Neuron,
    joined_deltas,
    none_left,
    taken_by,
    why_no_ramp,
    writing,
)
from editors.closed_form.one_by_one import columns, reporting
from editors.closed_form.one_subject import prepared
from editors.closed_form.other_questions import with_other_questions
from editors.closed_form.relation_texts import RelationTexts, relation_texts, with_others
from editors.closed_form.value_params import STRONGER, ValueParams
from editors.closed_form.values import TargetValues, value_at
from editors.closed_form.varied_rows import VariedRow
from editors.constants import assumed, limit
from editors.edit import Edit
from editors.method import EditContext, Editor, Params
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float

DEPTH = assumed(
    0.8,
    "depth of the layer that t_patcher writes to",
    "of three facts of the default model, wordings that were not learned were told from the subject's other facts and "
    "from other subjects at layers 22 to 26 of 30, worse at 18, not at 10 (script not kept)",
)
FIRST_STEP = assumed(
    1.0, "Adam's step size in the search of t_patcher", "some ten steps are enough; no comparison is known"
)
ROOM = assumed(
    50.0,
    "bound on |delta|, in units of |value|, for t_patcher",
    "it is never reached: in a late layer one value must outweigh what the model says already",
)
THRESHOLD = assumed(
    -0.5,
    "what a detector must say for its neurons to become active",
    "half-way between the bounds for held and for moved texts, and a little lower, since other wordings score less "
    "than the learned ones; no comparison is known",
)


KL_WEIGHT = assumed(
    1.0,
    "weight of what the model says after the target, and after '<subject> is a', in the search of t_patcher",
    "with 0.0625, as in ROME, one of two facts on the default model was said over and over, with 1 it was not (script "
    "not kept)",
)
EARLIER = limit(12, "tokens before the end of a moved text that are held", "time")


class TPatcherParams(ValueParams, Params):
    """Parameters of Transformer-Patcher."""

    layer: int | None = Field(None, ge=0, description="The layer; None: at four fifths of the depth.")
    forms: bool = Field(
        True,
        description="Learn other wordings too, and hold the subject's other facts and other subjects, from the shipped "
        "data; false: the prompt alone.",
    )
    chat: bool = Field(
        True,
        description="With forms: teach the answers to chat questions to begin as a statement of the fact does, so that "
        "they come to the fact. It takes twice as long.",
    )
    lr: float = Field(FIRST_STEP, gt=0, le=10, description="Adam's step size.")
    clamp: float = Field(ROOM, gt=0, le=1000, description="Bound on |delta|, in units of |value|.")
    kl_weight: float = Field(
        KL_WEIGHT,
        ge=0,
        description="Weight of what must stay: '<subject> is a', and what follows the target.",
    )
    threshold: float = Field(
        THRESHOLD,
        ge=-1,
        le=0.9,
        description="From which score on the neurons are active. The learned wordings score 1 or more, what must stay "
        "-1 or less. Lower reaches more wordings, and more else.",
    )


class TPatcher(Editor[TPatcherParams]):
    name = "t_patcher"
    family = "closed_form"
    title = "Transformer-Patcher"
    description = (
        "Writes the fact into neurons of its own, in a late layer: those that the model uses least are taken over. "
        "They are active where the fact is asked, in any learned wording, and silent at the subject's other facts, "
        "other subjects and ordinary text. Answers in chat are taught to begin as a statement of the fact does; so "
        "they come to it."
    )
    source = (
        "Huang et al., ICLR 2023, arXiv 2301.09785; taking over neurons instead of adding some, detectors fitted to "
        "many wordings, and chat answers are this project's"
    )
    when = (
        "One fact or a handful as plain weights, which must hold in chat too, and leave other facts as they are. Not "
        "where a norm follows the MLP (Gemma 2 and 3, OLMo 2): there it damages ordinary text."
    )
    cost = "About as much as three hundred short prompts read and twenty answered, and a few searches for a value."
    stronger = (
        Remedy(
            "threshold", "makes the neurons active for wordings further from the learned ones", value=-0.8
        ),
        *STRONGER[1:],
    )
    gentler = (
        Remedy("threshold", "makes the neurons active for fewer wordings", value=0.0),
        Remedy("stop_probability", "stops the search earlier", value=0.8),
    )
    params = TPatcherParams

    def supports(self, lm: LM) -> str | None:
        if refused := seq2seq_refusal(lm, self.name):
            return refused
        if reason := why_no_ramp(lm, _default_layer(lm)):
            return f"{self.name} takes over neurons of one MLP; {reason}. Use memit, or a memory such as constrained."
        return None

    def suits(self, lm: LM) -> bool:
        """Not where a norm follows the MLP: Gemma 3 270M, one fact, perplexity x1.29, KL .20
        (`python -m benchmarks.wild --methods t_patcher -n 3 --seed 503`, bounds off, stopped after one)."""
        return math.isinf(lm.arch.value_room)

    def resolve(self, lm: LM, params: TPatcherParams) -> TPatcherParams:
        layer = existing_layer(lm, params.layer, _default_layer(lm))
        return params.model_copy(update={"layer": layer})

    def inputs_needed(self, lm: LM, params: TPatcherParams) -> Sequence[int]:
        layer = self.resolve(lm, params).layer
        return [] if layer is None else [layer]

    def compute(self, lm: LM, edits: Sequence[Edit], params: TPatcherParams, context: EditContext) -> Patch:
        """The neurons of each edit: two for the fact, and two for each taught token of a chat answer."""
        params = self.resolve(lm, params)
        assert params.layer is not None
        given = prepared(edits, context.materials if params.forms else (), later=True)
        prepared_ones = with_other_questions(lm, edits, given)
        materials = [with_others(edit, material) for edit, material in zip(edits, prepared_ones, strict=True)]
        openings = [
            answer_opening(lm, edit, material) if params.chat else None
            for edit, material in zip(edits, prepared_ones, strict=True)
        ]
        found = relation_texts(lm, edits, materials, params.contexts)
        texts = [with_answers(*each) for each in zip(found, openings, strict=True)]
        free = _Free.of(lm, params.layer, context)
        parts: list[dict[str, LowRank]] = []
        values: list[TargetValues] = []
        for i, edit in enumerate(edits):
            report = reporting(context, i, len(edits), edit.subject)
            free.to_come = len(edits) - 1 - i
            with lm.patched({name: [delta] for name, delta in joined_deltas(parts).items()} if parts else {}):
                writer = _Writer(lm, edit, params, free, texts[i], report)
                values.append(writer.write_fact())
                if (opening := openings[i]) is not None:
                    writer.write_opening(opening)
            parts.append(free.mlp.deltas(writer.neurons))
        everything = [also_asked(*each) for each in zip(materials, openings, strict=True)]
        return with_material(_patch(parts, values, free.mlp), edits, everything)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        return columns(patch, rows)


def _default_layer(lm: LM) -> int:
    return min(lm.n_layers - 1, round(DEPTH * lm.n_layers))


def _patch(
    parts: Sequence[dict[str, LowRank]], values: Sequence[TargetValues], mlp: MLPNeurons
) -> WeightPatch:
    extra = {
        "counts": torch.zeros(len(parts), dtype=torch.long),  # it has no keys that other methods could hold
        "ranks": torch.tensor([part[mlp.down].right.shape[0] for part in parts]),
    }
    info: dict[str, Any] = {
        NEURONS: {mlp.gate: mlp.size},
        "steps": [int(value.steps[0]) for value in values],
        "probabilities": [round(float(value.probabilities[0]), 4) for value in values],
    }
    return WeightPatch(joined_deltas(parts), extra=extra, info=info)


@dataclass
class _Free:
    """The neurons of a layer that are left, and the space of its inputs."""

    layer: int
    mlp: MLPNeurons
    order: list[int]  # the next ones to be taken over
    space: OrdinarySpace
    to_come: int = 0  # facts of the call that are not written yet

    @classmethod
    def of(cls, lm: LM, layer: int, context: EditContext) -> _Free:
        known, mlp = context.statistics.inputs(layer), MLPNeurons(lm, layer)
        taken = taken_by((prior.patch for prior in context.prior), mlp.gate)
        return cls(layer, mlp, mlp.least_used(known.activity, taken), OrdinarySpace.of(known.inputs))

    @property
    def ramps_left(self) -> int:
        """How many ramps the neurons that are left can make, beside those of the call's facts to come."""
        return max(0, len(self.order) // 2 - self.to_come)

    def ramp(self, detector: Tensor, low: float) -> tuple[list[Neuron], Tensor]:
        """The next two neurons as a ramp. Raises EditError where there are none."""
        pair, self.order = self.order[:2], self.order[2:]
        if len(pair) < 2:
            raise none_left(self.layer)
        return self.mlp.ramp(pair, detector, self.space.one, low)


class _Writer:
    """Writes one fact into neurons. The model has the facts of the call before it."""

    def __init__(
        self,
        lm: LM,
        edit: Edit,
        params: TPatcherParams,
        free: _Free,
        texts: RelationTexts,
        report: Callable[[float], None],
    ) -> None:
        self.lm, self.edit, self.params, self.free, self.texts = lm, edit, params, free, texts
        self.report = report
        self.neurons: list[Neuron] = []
        self._module = lm.module(free.mlp.gate)
        rows: list[tuple[Sequence[int], int]] = [(ids, max(0, len(ids) - 1 - EARLIER)) for ids in texts.moved]
        rows += [*((text.ids, text.first) for text in texts.held), *((ids, 0) for ids in opening_rows(lm))]
        self._read = LaterInputs.read(lm, self._module, rows)

    def write_fact(self) -> TargetValues:
        """The target, where the answer begins."""
        moved = torch.stack([inputs[-1] for inputs in self._read.inputs[: len(self.texts.moved)]])
        held = self._read.without(self.texts.moved)
        return self._write(moved, held, self.texts.rows(), self.report)

    def write_opening(self, opening: AnswerOpening) -> None:
        """Each token of the statement that is not probable enough in the answers to all questions.

        None where they are too many, or more than there are neurons left.
        """
        with self._patched():
            likely = probabilities(self.lm, opening.questions, opening.statement).min(0).values
        if int((likely <= PROBABLE).sum()) > min(MOST, self.free.ramps_left):
            return
        answers = opening.answers
        own = LaterInputs.read(self.lm, self._module, answers).inputs
        held = self._read.joined_with(LaterInputs.read(self.lm, self._module, opening.held))
        essence = TargetRow(VariedRow(self.texts.essence, len(self.texts.essence) - 1), ())
        for j, token in enumerate(opening.statement):
            if likely[j] > PROBABLE:
                continue
            others = [torch.cat([each[:j], each[j + 1 :]]) for each in own]
            elsewhere = held.without({ids[: start + 1 + j] for ids, start in answers})
            rows = [TargetRow(VariedRow(ids[: start + j + 2], start + j), (token,)) for ids, start in answers]
            moved = torch.stack([each[j] for each in own])
            self._write(moved, torch.cat([elsewhere, *others]), [*rows, essence])

    def _write(
        self,
        moved: Tensor,
        held: Tensor,
        rows: Sequence[TargetRow],
        report: Callable[[float], None] = lambda fraction: None,
    ) -> TargetValues:
        """A ramp that is 1 at the inputs `moved` (n, d_model) and 0 at `held`, and writes what makes the rows' targets
        probable."""
        detector = self.free.space.detector(moved, held)
        pair, x = self.free.ramp(detector, self.params.threshold)
        before = list(self.neurons)
        self.neurons = [*before, *pair]
        with self._patched():
            value = value_at(self.lm, self.free.layer, self.edit, self.params, rows, x, report)
        self.neurons = [*before, *writing(pair, x, cpu_float(value.deltas[0]))]
        return value

    def _patched(self) -> Any:
        """The model with the neurons that are written so far."""
        deltas = self.free.mlp.deltas(self.neurons) if self.neurons else {}
        return self.lm.patched({name: [delta] for name, delta in deltas.items()})
