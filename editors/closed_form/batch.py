"""What the batch methods share: target values, their shares by layer, one solution per layer, and subsets of a
batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from editors.closed_form.batch_params import BatchParams, softened
from editors.closed_form.defaults import default_layer, refuse_unread, seq2seq_refusal
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
from editors.closed_form.value_params import GENTLER, STRONGER, fitted
from editors.closed_form.values import TargetValues
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.forms.form import Material
from editors.method import EditContext, Editor
from editors.metric import Inverse
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import Patch, WeightPatch, with_training_of

B = TypeVar("B", bound="BatchParams")


@dataclass(frozen=True)
class BatchRows:
    """Token ids up to the keys of a batch, for each edit: those to move and those to hold still."""

    moved: Sequence[Rows]
    targets: Sequence[Rows]  # the tokens of the edit's own target
    others: Sequence[Rows]  # other facts of its subject
    group: Sequence[int]  # equal for edits of one subject

    @property
    def held(self) -> list[Rows]:
        """All that are held still."""
        return [[*targets, *others] for targets, others in zip(self.targets, self.others, strict=True)]


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
        refuse_unread(lm, layers)
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
        # lowered for earlier facts only: a fact's value must not depend on the size of its batch
        clamp = softened(params.clamp, facts_written(context.prior)) if params.soften else params.clamp
        materials = prepared(edits, context.materials if params.forms else ())
        rows = self._rows(lm, edits, params, materials)
        values = self._values(lm, edits, params.model_copy(update={"clamp": clamp}), context, rows, materials)

        def share(fraction: float) -> None:
            context.report(0.9 + 0.08 * fraction, "keys by layer")

        shares = spread(lm, params.layers, rows.moved, values, self.root, share)
        context.report(0.98, "solving")
        extra, weights = self._solved_layers(lm, shares, rows, params, context)
        info: dict[str, Any] = {
            "weights": weights,
            "clamp": round(clamp, 4),
            "steps": values.steps.tolist(),
            "probabilities": [round(float(p), 4) for p in values.probabilities],
        }
        return with_material(_solve(extra, info), edits, materials)

    def _rows(self, lm: LM, edits: Sequence[Edit], params: B, materials: Sequence[Material]) -> BatchRows:
        """The token ids up to each key that the batch moves or holds still."""
        each = list(zip(edits, materials, strict=True))
        moved = [subject_rows(lm, edit, params, material) for edit, material in each]
        targets = [target_rows(lm, edit) if params.hold_targets else [] for edit in edits]
        moved_anyhow = {row for of_edit in moved for row in of_edit}
        others = [
            [row for row in held_rows(lm, edit, params, material) if row not in moved_anyhow]
            for edit, material in each
        ]
        return BatchRows(moved, targets, others, subject_groups(edits))

    def _values(
        self,
        lm: LM,
        edits: Sequence[Edit],
        params: B,
        context: EditContext,
        rows: BatchRows,
        materials: Sequence[Material],
    ) -> TargetValues:
        """The target values at the last of the layers."""
        assert params.layers is not None

        def search(fraction: float) -> None:
            context.report(0.9 * fraction, f"target values of {len(edits)} facts")

        sought = materials if any(material != NOTHING for material in materials) else ()
        return find_group_values(
            lm,
            params.layers[-1],
            edits,
            params,
            search,
            attention=self.attention,
            materials=sought,
            reads=self._reads(lm, rows, params, context.statistics) if sought else None,
        )

    def _solved_layers(
        self, lm: LM, shares: Mapping[int, Share], rows: BatchRows, params: B, context: EditContext
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the patch keeps of all layers, and lambda by weight."""
        held = rows.held
        held_keys = read_keys(lm, list(shares), [row for of_edit in held for row in of_edit])
        moved = [[True] * len(a) + [False] * len(b) for a, b in zip(rows.moved, held, strict=True)]
        extra: dict[str, Tensor] = {
            "counts": torch.tensor([len(of_edit) for of_edit in moved]),
            "moved": torch.tensor([m for of_edit in moved for m in of_edit]),
        }
        if len(set(rows.group)) < len(rows.group):
            extra["group"] = torch.tensor(rows.group)
        weights: dict[str, float] = {}
        for layer, part in shares.items():
            name = lm.mlp_out(layer)
            inverse = holding_the_opening(lm, layer, self.inverse(context.statistics, layer, params))
            tensors, weights[name] = self._solved(
                inverse, name, part, held_keys[layer], extra["moved"], params, context
            )
            extra |= tensors
        return extra, weights

    def _reads(self, lm: LM, rows: BatchRows, params: B, statistics: Statistics) -> Tensor | None:
        """x (n, d_in) of the change delta x^T that would write each edit alone; None where several layers share it.

        Facts of one group are written with the rows of all of them.
        """
        assert params.layers is not None
        if len(params.layers) > 1:
            return None
        (layer,) = params.layers
        inverse = holding_the_opening(lm, layer, self.inverse(statistics, layer, params))
        found: dict[int, Tensor] = {}
        for g in dict.fromkeys(rows.group):
            mine = [i for i, other in enumerate(rows.group) if other == g]
            moved, still = ([row for i in mine for row in part[i]] for part in (rows.moved, rows.others))
            keys = read_keys(lm, [layer], [*moved, *still])[layer]
            solved = solved_keys(keys, inverse)
            weight, _ = self.weights(keys[: len(moved)], solved[: len(moved)], params)
            each = update(keys.new_zeros(len(keys), 1), keys, solved, weight)
            found[g] = collapse(each, [len(keys)], torch.arange(len(keys)) < len(moved)).right[0]
        return torch.stack([found[g] for g in rows.group])

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
        """The batch solved again from the stored keys and values of these rows; no value is searched for again."""
        extra, info = rows_of(patch, rows)
        return with_training_of(_solve(extra, info), patch, rows)


def _solve(extra: dict[str, Tensor], info: dict[str, Any]) -> WeightPatch:
    """The deltas of the stored keys, solved keys and residuals."""
    counts, moved = extra["counts"], extra["moved"]
    group = extra["group"].tolist() if "group" in extra else None
    deltas: dict[str, LowRank] = {}
    for name, weight in info["weights"].items():
        residuals = extra[f"{name}:residuals"].repeat_interleave(counts, dim=0)
        each = update(residuals, extra[f"{name}:keys"], extra[f"{name}:solved"], weight)
        deltas[name] = collapse(each, counts.tolist(), moved, group)
    return WeightPatch(deltas, extra=extra, info=info)
