"""What the batch methods share: target values, their shares by layer, one solution per layer, and its subsets."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from editors.closed_form.defaults import default_layer, seq2seq_refusal
from editors.closed_form.keys import (
    held_rows,
    holding_the_opening,
    read_keys,
    subject_rows,
    target_rows,
)
from editors.closed_form.material_rows import NOTHING, with_material
from editors.closed_form.one_subject import (
    find_group_values,
    others_keys,
    prepared,
    subject_groups,
)
from editors.closed_form.prior_keys import facts_written, prior_keys, rows_of
from editors.closed_form.solve import collapse, solved_keys, update
from editors.closed_form.spread import Rows, Share, spread
from editors.closed_form.value_params import GENTLER, STRONGER, ValueParams, fitted
from editors.constants import DEFAULT_MODEL, assumed
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.method import EditContext, Editor, Params
from editors.metric import RIDGE, Inverse
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import Patch, WeightPatch, with_training_of

MANY = assumed(
    30,
    "active earlier facts above which the clamp is lowered",
    "the clamp stays as it is for the batches of 30 that the defaults were measured with",
)
SLOPE = assumed(
    1 / 3,
    "the clamp falls with this power of the number of earlier facts",
    "many facts together then move the model less; no comparison of powers is known",
)
LEAST = assumed(
    2 / 3,
    "lowest share of the clamp that is left on top of many facts",
    f"seen once on {DEFAULT_MODEL}, command not recorded: alphaedit, 200 CounterFact facts in one batch, efficacy .92 "
    "and perplexity x1.109 at this share, .925 and x1.205 at the whole clamp",
)
B = TypeVar("B", bound="BatchParams")


class BatchParams(ValueParams, Params):
    """Parameters that the batch methods share."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="The layers the change is spread over; None: by this model's depth."
    )
    lr: float = Field(
        assumed(2.0, "Adam's step size of the batch methods"),
        gt=0,
        le=10,
        description="Adam's step size.",
    )
    clamp: float = Field(
        assumed(
            3.75,
            "bound on |delta| of the batch methods, in units of |value|",
            "lower than ROME's: a value that moves further moves the other facts of its batch more",
        ),
        gt=0,
        le=100,
        description="Bound on |delta|, in units of |value|; what moves other facts of a batch most.",
    )
    soften: bool = Field(
        True,
        description="Lower the clamp, down to two thirds, on top of more than 30 active facts: each new one then "
        "moves ordinary text less, and holds less well in other wordings.",
    )
    stop_probability: float = Field(
        assumed(0.95, "target probability at which a batch stops", "higher moves ordinary text more"),
        gt=0,
        lt=1,
        description="Stop once the target's mean probability over the contexts is this. More generalises better, "
        "takes longer, and moves ordinary text more.",
    )
    wordings: int = Field(
        2, ge=0, le=5, description="Other openings behind which the subject's key is mapped to the value too."
    )
    hold_targets: bool = Field(
        True,
        description="Hold the keys of the targets' own tokens after the prompt still: other facts would change how "
        "the answer goes on.",
    )
    ridge: float = Field(
        RIDGE, gt=0, le=10, description="Added to the second moment, in units of its mean diagonal."
    )
    sample: str = Field("self", description="The second moment's sample: self, or a corpus computed before.")
    remember: bool = Field(
        True,
        description="Hold the keys of active earlier edits still, so that a sequence keeps what it learnt.",
    )


class BatchEditor(Editor[B], Generic[B]):
    """Write a batch of facts as one change of each of a few MLPs, delta = R X^T (see solve.py)."""

    family = "closed_form"
    batch = True
    stronger = STRONGER
    gentler = GENTLER
    span = 1  # layers the change is spread over by default
    root = False
    attention = False

    @abstractmethod
    def inverse(self, statistics: Statistics, layer: int, params: B) -> Inverse:
        """M^-1 of a layer."""

    @abstractmethod
    def weights(self, keys: Tensor, solved: Tensor, params: B) -> tuple[float, float]:
        """lambda for this batch's keys and mu for earlier ones, from the keys (rows, d_in) and M^-1 keys."""

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def resolve(self, lm: LM, params: B) -> B:
        """The layers up to where one-layer methods edit, or the caller's own, sorted."""
        last = default_layer(lm)
        default = tuple(range(max(0, last + 1 - self.span), last + 1))
        layers = default if lm.arch.mlp_adds_directly else (last,)
        if params.layers is not None:
            layers = tuple(sorted(set(params.layers)))
        for layer in layers:
            lm.mlp_out(layer)  # InvalidEdit for one that does not exist
        if len(layers) > 1 and not lm.arch.mlp_adds_directly:
            raise InvalidEdit(
                f"params.layers {list(layers)} are several, but in {lm.arch.family} an MLP's output reaches the "
                "residual stream normed or scaled, so that a change cannot be shared out; name one layer"
            )
        return fitted(lm, params).model_copy(update={"layers": layers})

    def layers_needed(self, lm: LM, params: B) -> Sequence[int]:
        return self.resolve(lm, params).layers or ()

    def compute(self, lm: LM, edits: Sequence[Edit], params: B, context: EditContext) -> Patch:
        """One low-rank delta per layer; row i of the patch is edit i."""
        params = self.resolve(lm, params)
        assert params.layers is not None
        for layer in params.layers:
            self.inverse(context.statistics, layer, params)  # raises NotReady before the long part

        def search(fraction: float) -> None:
            context.report(0.9 * fraction, f"target values of {len(edits)} facts")

        def share(fraction: float) -> None:
            context.report(0.9 + 0.08 * fraction, "keys by layer")

        # lowered by earlier facts alone: a fact's value must not depend on how many others its batch has
        clamp = softened(params.clamp, facts_written(context.prior)) if params.soften else params.clamp
        searched = params.model_copy(update={"clamp": clamp})
        group = subject_groups(edits)
        materials = prepared(edits, context.materials if params.forms else ())
        each = list(zip(edits, materials, strict=True))
        rows = [subject_rows(lm, edit, params, material) for edit, material in each]
        held = [target_rows(lm, edit) if params.hold_targets else [] for edit in edits]
        moved_anyhow = {row for of_edit in rows for row in of_edit}
        still = [
            [row for row in held_rows(lm, edit, params, material) if row not in moved_anyhow]
            for edit, material in each
        ]
        sought = materials if any(material != NOTHING for material in materials) else ()
        values = find_group_values(
            lm,
            params.layers[-1],
            edits,
            searched,
            search,
            attention=self.attention,
            materials=sought,
            reads=self._reads(lm, rows, still, group, params, context.statistics) if sought else None,
        )
        shares = spread(lm, params.layers, rows, values, self.root, share)
        held = [targets + others for targets, others in zip(held, still, strict=True)]
        held_keys = read_keys(lm, params.layers, [row for of_edit in held for row in of_edit])
        moved = [[True] * len(a) + [False] * len(b) for a, b in zip(rows, held, strict=True)]
        extra: dict[str, Tensor] = {
            "counts": torch.tensor([len(of_edit) for of_edit in moved]),
            "moved": torch.tensor([m for of_edit in moved for m in of_edit]),
        }
        if len(set(group)) < len(edits):
            extra["group"] = torch.tensor(group)
        weights: dict[str, float] = {}
        context.report(0.98, "solving")
        for layer, part in shares.items():
            name = lm.mlp_out(layer)
            inverse = holding_the_opening(lm, layer, self.inverse(context.statistics, layer, params))
            tensors, weights[name] = self._solved(
                inverse, name, part, held_keys[layer], extra["moved"], params, context
            )
            extra |= tensors
        info: dict[str, Any] = {
            "weights": weights,
            "clamp": round(clamp, 4),
            "steps": values.steps.tolist(),
            "probabilities": [round(float(p), 4) for p in values.probabilities],
        }
        return with_material(_solve(extra, info), edits, materials)

    def _reads(
        self,
        lm: LM,
        rows: Sequence[Rows],
        held: Sequence[Rows],
        group: Sequence[int],
        params: B,
        statistics: Statistics,
    ) -> Tensor | None:
        """x (n, d_in) of the change delta x^T that would write each edit alone; None where several layers share it.

        `rows` and `held` are the token ids up to each edit's keys, those to move and those to hold still; facts of one
        `group` are written with all of theirs.
        """
        assert params.layers is not None
        if len(params.layers) > 1:
            return None
        (layer,) = params.layers
        inverse = holding_the_opening(lm, layer, self.inverse(statistics, layer, params))
        found: dict[int, Tensor] = {}
        for g in dict.fromkeys(group):
            mine = [i for i, other in enumerate(group) if other == g]
            moved, still = ([row for i in mine for row in part[i]] for part in (rows, held))
            keys = read_keys(lm, [layer], [*moved, *still])[layer]
            solved = solved_keys(keys, inverse)
            weight, _ = self.weights(keys[: len(moved)], solved[: len(moved)], params)
            each = update(keys.new_zeros(len(keys), 1), keys, solved, weight)
            found[g] = collapse(each, [len(keys)], torch.arange(len(keys)) < len(moved)).right[0]
        return torch.stack([found[g] for g in group])

    def _solved(
        self,
        inverse: Inverse,
        name: str,
        part: Share,
        held: Tensor,
        moved: Tensor,
        params: B,
        context: EditContext,
    ) -> tuple[dict[str, Tensor], float]:
        """What a patch keeps of one layer (keys, M^-1 keys, residuals), and lambda.

        `held` are keys that must not change, `moved` (rows,) is True for the others.
        """
        keys = part.keys.new_empty(len(moved), part.keys.shape[1])
        keys[moved], keys[~moved] = part.keys, held
        plain = solved_keys(keys, inverse)
        weight, mu = self.weights(part.keys, plain[moved], params)
        earlier = prior_keys(context.prior, name) if params.remember else None
        earlier = others_keys(earlier, part.keys, inverse)
        solved = plain if earlier is None else solved_keys(keys, inverse, earlier, mu)
        tensors = {
            f"{name}:keys": keys,
            f"{name}:solved": solved,
            f"{name}:residuals": part.residuals.contiguous(),
        }
        return tensors, weight

    def subset(self, patch: Patch, rows: Sequence[int], statistics: Statistics) -> Patch:
        """The batch solved again from the stored keys and values of these rows; nothing is sought anew."""
        extra, info = rows_of(patch, rows)
        return with_training_of(_solve(extra, info), patch, rows)


def softened(clamp: float, earlier: int) -> float:
    """The clamp on top of so many facts."""
    return clamp * max(LEAST, math.pow(MANY / max(MANY, earlier), SLOPE))


def _solve(extra: dict[str, Tensor], info: dict[str, Any]) -> WeightPatch:
    """The deltas that the stored keys, solved keys and residuals stand for."""
    counts, moved = extra["counts"], extra["moved"]
    group = extra["group"].tolist() if "group" in extra else None
    deltas: dict[str, LowRank] = {}
    for name, weight in info["weights"].items():
        residuals = extra[f"{name}:residuals"].repeat_interleave(counts, dim=0)
        each = update(residuals, extra[f"{name}:keys"], extra[f"{name}:solved"], weight)
        deltas[name] = collapse(each, counts.tolist(), moved, group)
    return WeightPatch(deltas, extra=extra, info=info)
