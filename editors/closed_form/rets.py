"""RETS: one fact written where its relation has been read (Liu et al., AAAI 2025, arXiv 2408.15091)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from editors.advice import Remedy
from editors.closed_form.answer_openings import (
    AnswerOpening,
    also_asked,
    answer_opening,
    opening_changes,
    with_answers,
)
from editors.closed_form.defaults import existing_layer, seq2seq_refusal
from editors.closed_form.keys import LaterKeys, holding_the_opening, read_later_keys
from editors.closed_form.material_rows import with_material
from editors.closed_form.one_by_one import columns, joined, reporting
from editors.closed_form.one_subject import others_keys, prepared
from editors.closed_form.prior_keys import prior_keys
from editors.closed_form.relation_texts import RelationTexts, relation_texts, with_others
from editors.closed_form.solve import direction
from editors.closed_form.value_params import STRONGER, ValueParams
from editors.closed_form.values import TargetValues, value_at
from editors.constants import assumed
from editors.edit import Edit
from editors.method import EditContext, Editor, Params
from editors.metric import RIDGE, Inverse
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, cpu_float

DEPTH = assumed(
    0.8,
    "depth of the layer that rets writes to",
    "of six facts of the default model, wordings that were not learned got .43 of the change or less at layers 8 to 22 "
    "of 30, and .67 of it at layer 24 (.63 at 26), other subjects .12 (script not kept)",
)
SLACK = assumed(
    0.1,
    "how loosely keys are moved and held, in units of their mean square under the second moment",
    "no comparison is known; all figures of this method are with it",
)
FIRST_STEP = assumed(
    1.0,
    "Adam's step size in the search of rets",
    "some ten steps are enough on the default model; no comparison is known",
)
ROOM = assumed(
    50.0,
    "bound on |delta|, in units of |value|, for rets",
    "it is never reached: in a late layer one value must outweigh what the model says already",
)


class RetsParams(ValueParams, Params):
    """Parameters of RETS."""

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
    slack: float = Field(
        SLACK,
        gt=0,
        le=10,
        description="How loosely keys are moved and held, in units of their mean square under the second moment.",
    )
    ridge: float = Field(
        RIDGE, gt=0, le=10, description="Added to the second moment, in units of its mean diagonal."
    )
    remember: bool = Field(True, description="Hold the keys of active earlier edits still.")
    sample: str = Field("self", description="The second moment's sample: self, or a corpus computed before.")


class Rets(Editor[RetsParams]):
    name = "rets"
    family = "closed_form"
    title = "Relation-focused editing with subject constraints"
    description = (
        "Writes the fact into a late layer, at the last token before the answer, where subject and relation have been "
        "read: a rank-one change that moves the keys of the fact's wordings, and holds those of the subject's other "
        "facts and of other subjects. Answers in chat are taught to begin as a statement of the fact does, so that "
        "they come to it."
    )
    source = "Liu et al., AAAI 2025, arXiv 2408.15091; other wordings and held facts are this project's"
    when = (
        "One fact or a handful as plain weights, which must hold in chat too. Some of the subject's other facts may "
        "still be lost. Not where a norm follows the MLP (Gemma 2 and 3, OLMo 2): there it damages ordinary text."
    )
    cost = "About as much as three hundred short prompts read and twenty answered, and searches over a few layers."
    stronger = (Remedy("slack", "moves and holds keys more exactly", factor=0.3, limit=0.003), *STRONGER[1:])
    gentler = (
        Remedy("slack", "moves keys less exactly", factor=3.0, limit=3.0),
        Remedy("stop_probability", "stops the search earlier", value=0.8),
    )
    params = RetsParams

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def suits(self, lm: LM) -> bool:
        """Not where a norm follows the MLP: Gemma 3 270M, three facts, neighbours .19, perplexity x1.49
        (`python -m benchmarks.wild --methods rets -n 3 --seed 11`)."""
        return math.isinf(lm.arch.value_room)

    def resolve(self, lm: LM, params: RetsParams) -> RetsParams:
        layer = existing_layer(lm, params.layer, min(lm.n_layers - 1, round(DEPTH * lm.n_layers)))
        return params.model_copy(update={"layer": layer})

    def layers_needed(self, lm: LM, params: RetsParams) -> Sequence[int]:
        layer = self.resolve(lm, params).layer
        return [] if layer is None else [layer]

    def compute(self, lm: LM, edits: Sequence[Edit], params: RetsParams, context: EditContext) -> Patch:
        """The updates of each edit, computed on top of those before it: of rank one for the fact, and for each taught
        token of a chat answer."""
        params = self.resolve(lm, params)
        assert params.layer is not None
        parameter = lm.mlp_out(params.layer)
        metric: Inverse = context.statistics.metric(params.layer, params.ridge, params.sample)
        metric = holding_the_opening(lm, params.layer, metric)
        prepared_ones = prepared(edits, context.materials if params.forms else ())
        materials = [with_others(edit, material) for edit, material in zip(edits, prepared_ones, strict=True)]
        openings = [
            answer_opening(lm, edit, material) if params.chat else None
            for edit, material in zip(edits, prepared_ones, strict=True)
        ]
        found = relation_texts(lm, edits, materials, params.contexts)
        texts = [with_answers(*each) for each in zip(found, openings, strict=True)]
        known = prior_keys(context.prior, parameter) if params.remember else None
        done: list[LowRank] = []
        keys: list[Tensor] = []
        values: list[TargetValues] = []
        for i, edit in enumerate(edits):
            report = reporting(context, i, len(edits), edit.subject)
            before = [*([] if known is None else [known]), *keys]
            with lm.patched({parameter: done} if done else {}):
                change, moved, value = _written(
                    lm, edit, texts[i], openings[i], params, metric, before, report
                )
            done.append(change)
            keys.append(moved)
            values.append(value)
        everything = [also_asked(*each) for each in zip(materials, openings, strict=True)]
        return with_material(joined(parameter, done, keys, values), edits, everything)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        return columns(patch, rows)


def _written(
    lm: LM,
    edit: Edit,
    texts: RelationTexts,
    opening: AnswerOpening | None,
    params: RetsParams,
    metric: Inverse,
    before: Sequence[Tensor],
    report: Callable[[float], None],
) -> tuple[LowRank, Tensor, TargetValues]:
    """The change of one fact, the keys it moves (moved, d_in), and its value; `before`: keys of other edits."""
    assert params.layer is not None
    rows = [(ids, len(ids) - 1) for ids in texts.moved] + [(text.ids, text.first) for text in texts.held]
    read = LaterKeys(rows, read_later_keys(lm, params.layer, rows))
    count = len(texts.moved)
    moved, held = torch.cat(list(read.keys[:count])), torch.cat(list(read.keys[count:]))
    earlier = others_keys(torch.cat(list(before)) if before else None, moved, metric)
    x = direction(moved, metric, params.slack, earlier, held)
    value = value_at(lm, params.layer, edit, params, texts.rows(), x, report)
    change = LowRank(cpu_float(value.deltas[0])[:, None], x[None].float().contiguous())
    if opening is None:
        return change, moved, value
    with lm.patched({lm.mlp_out(params.layer): [change]}):
        more = opening_changes(
            lm, edit, params.layer, opening, texts, read, params, metric, 0.3 * params.slack
        )
    changes, keys = [change, *(each for each, _ in more)], [moved, *(each for _, each in more)]
    left, right = torch.cat([c.left for c in changes], 1), torch.cat([c.right for c in changes])
    return LowRank(left, right), torch.cat(keys), value
