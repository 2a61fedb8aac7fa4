"""ROME: one fact as a rank-one change of one MLP (Meng et al., NeurIPS 2022, arXiv 2202.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from editors.closed_form.defaults import default_layer, existing_layer, refuse_unread, seq2seq_refusal
from editors.closed_form.keys import holding_the_opening
from editors.closed_form.material_rows import NOTHING, with_material
from editors.closed_form.one_by_one import columns, joined, reporting
from editors.closed_form.one_subject import prepared
from editors.closed_form.prior_keys import prior_keys
from editors.closed_form.value_params import GENTLER, STRONGER, ValueParams, fitted
from editors.closed_form.values import TargetValues
from editors.closed_form.write_one import write
from editors.edit import Edit
from editors.method import EditContext, Editor, Params
from editors.metric import RIDGE, Inverse, Metric
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch


class RomeParams(ValueParams, Params):
    """Parameters of ROME."""

    layer: int | None = Field(
        None, ge=0, description='The layer; None: at a sixth of the depth; "auto": see suggest_layers.'
    )
    mode: Literal["full", "simplified"] = Field(
        "full", description="full: keys weighed by the second moment; simplified: by the identity."
    )
    keys: Literal["each", "mean"] = Field(
        "each",
        description="each: the subject's key in every context is mapped to the value; mean: their mean alone.",
    )
    ridge: float = Field(
        RIDGE, gt=0, le=10, description="Added to the second moment, in units of its mean diagonal."
    )
    remember: bool = Field(
        True,
        description="Hold the keys of active earlier edits still, so that a sequence keeps what it learnt.",
    )
    sample: str = Field("self", description="The second moment's sample: self, or a corpus computed before.")


class Rome(Editor[RomeParams]):
    name = "rome"
    family = "closed_form"
    title = "Rank-one model editing"
    description = (
        "Writes one association into one MLP: finds the key of the subject's last token and the value that makes the "
        "model say the target, and adds the rank-one matrix that maps one to the other while moving typical keys least."
    )
    source = "Meng et al., NeurIPS 2022, arXiv 2202.05262"
    when = "One fact or a handful, each of its own; the usual choice for a single correction."
    cost = "One to three seconds of CPU per fact on a model of 135M parameters; second moments are computed once."
    stronger = STRONGER
    gentler = GENTLER
    params = RomeParams

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def resolve(self, lm: LM, params: RomeParams) -> RomeParams:
        layer = existing_layer(lm, params.layer, default_layer(lm))
        refuse_unread(lm, [layer])
        return fitted(lm, params).model_copy(update={"layer": layer})

    def layers_needed(self, lm: LM, params: RomeParams) -> Sequence[int]:
        layer = self.resolve(lm, params).layer
        return [layer] if params.mode == "full" and layer is not None else []

    def compute(self, lm: LM, edits: Sequence[Edit], params: RomeParams, context: EditContext) -> Patch:
        """One rank-one update per edit, each computed on top of those before it (column i belongs to edit i)."""
        params = self.resolve(lm, params)
        assert params.layer is not None
        parameter = lm.mlp_out(params.layer)
        metric: Inverse = Metric(None)
        if params.mode == "full":
            metric = context.statistics.metric(params.layer, params.ridge, params.sample)
        metric = holding_the_opening(lm, params.layer, metric)
        done: list[LowRank] = []
        keys: list[Tensor] = []
        known = prior_keys(context.prior, parameter) if params.remember else None
        materials = [NOTHING] * len(edits)
        if params.keys == "each":
            materials = prepared(edits, context.materials if params.forms else ())
        values: list[TargetValues] = []
        for i, edit in enumerate(edits):
            report = reporting(context, i, len(edits), edit.subject)
            with lm.patched({parameter: done} if done else {}):
                each = params.keys == "each"
                written = write(
                    lm,
                    params.layer,
                    edit,
                    params,
                    metric,
                    report,
                    each=each,
                    earlier=known,
                    material=materials[i],
                )
            done.append(written.change)
            keys.append(written.keys)
            values.append(written.value)
        return with_material(joined(parameter, done, keys, values), edits, materials)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        return columns(patch, rows)
