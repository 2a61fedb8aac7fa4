"""GRACE: a code book of keys, values and radii at one layer (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

Where the input of one MLP's output projection lies within the radius of a key, its output becomes the
key's value. Everywhere else the model computes exactly what it did before (the paper's "deferral").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.advice import Remedy
from editors.closed_form.defaults import existing_layer
from editors.constants import assumed, limit
from editors.edit import Edit
from editors.errors import EditError
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import Example, ExampleOptions, examples, trained_texts
from editors.memory.code_book import CodeBookPatch, Entries
from editors.method import EditContext, Editor, Params
from editors.model.activations import first, hooked, record, with_first
from editors.model.lm import LM
from editors.patch import Patch, cpu_float, with_training, with_training_of

DEPTH = assumed(
    0.7, "depth of grace's layer", "late enough that the last token's state depends on the whole prompt"
)
STRONGER = (
    Remedy("max_steps", "searches longer for the values", factor=2.0, limit=240),
    Remedy(
        "radius", "answers prompts whose states lie further from the keys", factor=1.5, limit=1.0, widens=True
    ),
)
GENTLER = (
    Remedy("radius", "answers only states that lie nearer to the keys", factor=0.67, limit=0.05),
    Remedy("margin", "keeps further away from states that must not change", factor=0.67, limit=0.1),
)


class GraceParams(Params):
    """Parameters of GRACE."""

    layer: int | None = Field(
        None, ge=0, description="The layer with the code book; None: at 70% of the depth."
    )
    radius: float = Field(
        assumed(0.3, "grace's initial radius, in units of the key's norm"),
        gt=0,
        le=2,
        description="A new key's radius, in units of its norm (the paper's initial epsilon).",
    )
    margin: float = Field(
        assumed(0.4, "grace's bound on a radius", "below a half, so that no preserved state is answered"),
        gt=0,
        lt=1,
        description="No radius is larger than this share of the distance to the nearest state to preserve (the same "
        "prompt with other subjects, neighbours, unrelated text).",
    )
    max_steps: int = Field(
        limit(
            60,
            "most steps of grace's search for values",
            "time: then the value stays as it is, and the report says what it achieves; mostly it stops before",
        ),
        ge=1,
        le=1000,
        description="Most steps of the search for values; it stops early.",
    )
    lr: float = Field(
        assumed(0.5, "grace's step size"),
        gt=0,
        le=10,
        description="Adam's step size.",
    )
    stop_probability: float = Field(
        assumed(0.95, "token probability at which grace's search stops"),
        gt=0,
        lt=1,
        description="Stop when every token of the target has this probability.",
    )
    use_probes: bool = Field(
        True, description="Also store the edit's paraphrases, and keep radii away from its neighbours."
    )


class Grace(Editor[GraceParams]):
    name = "grace"
    family = "memory"
    title = "Code book of hidden states (GRACE)"
    description = (
        "Stores the hidden state at the end of the prompt and the value that makes the model say the target. A prompt "
        "with nearly the same state gets that value; on every other prompt the model computes exactly what it did."
    )
    source = "Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031"
    when = "When nothing else may change at all; it answers the given prompts and hardly any other wording."
    cost = "Some ten passes through the upper layers; no statistics."
    kind = "codebook"
    stronger = STRONGER
    gentler = GENTLER
    params = GraceParams

    def resolve(self, lm: LM, params: GraceParams) -> GraceParams:
        layer = existing_layer(lm, params.layer, round(DEPTH * lm.n_layers))
        return params.model_copy(update={"layer": layer})

    def trained_on(self, edits: Sequence[Edit], params: GraceParams) -> list[list[str]]:
        return trained_texts(edits, _options(params), rehearse=False)

    def compute(self, lm: LM, edits: Sequence[Edit], params: GraceParams, context: EditContext) -> Patch:
        """Entries for each edit: one per prompt and token of the target."""
        params = self.resolve(lm, params)
        assert params.layer is not None
        name = lm.mlp_out(params.layer)
        each: list[Entries] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            rows = [row.without_end for row in examples(lm, edit, _options(params))]
            each.append(_EntrySearch(lm, params, name, rows, i).run(report))
        parts = (torch.cat([getattr(e, n) for e in each]) for n in vars(each[0]))
        patch = CodeBookPatch(name, Entries(*parts), info={"parameter": name})
        return with_training(patch, self.trained_on(edits, params))

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The entries of these edits only; their radii are settled again when the patch is attached."""
        assert isinstance(patch, CodeBookPatch)
        keep = torch.cat([(patch.entries.owners == r).nonzero()[:, 0] for r in rows])
        entries = patch.entries.select(keep)
        number = {r: i for i, r in enumerate(rows)}
        owners = torch.tensor([number[int(o)] for o in entries.owners])
        renumbered = Entries(entries.keys, entries.values, entries.radii, owners, entries.labels)
        some = CodeBookPatch(patch.parameter, renumbered, extra=patch.extra, info=patch.info)
        return with_training_of(some, patch, rows)


def _options(params: GraceParams) -> ExampleOptions:
    return ExampleOptions(contexts=1, others=12, probes=params.use_probes)


class _EntrySearch:
    """The search for the keys, radii and values of one edit."""

    def __init__(self, lm: LM, params: GraceParams, name: str, rows: Sequence[Example], owner: int) -> None:
        assert params.layer is not None
        self.lm, self.params, self.owner = lm, params, owner
        self.module = lm.module(name)
        targets = [r for r in rows if r.answer]
        self.labels = torch.tensor([t for r in targets for t in r.answer])
        self.keys, _ = self._states(targets)
        preserved, _ = self._states([r for r in rows if not r.answer])
        distances = torch.cdist(self.keys, preserved, compute_mode="donot_use_mm_for_euclid_dist")
        limits = params.margin * distances.min(dim=1).values
        self.radii = torch.minimum(params.radius * self.keys.norm(dim=1), limits)
        self.batch = ExampleBatch(lm, params.layer, targets)

    @torch.no_grad()
    def _states(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The module's inputs (columns that count, d_in) and outputs (columns that count, d_out)."""
        assert self.params.layer is not None
        batch = ExampleBatch(self.lm, self.params.layer, rows)
        with record({"x": self.module}, inputs=True) as inputs, record({"y": self.module}) as outputs:
            batch()
        keys, values = inputs["x"], outputs["y"]
        flat = batch.positions.to(keys.device)
        return (
            cpu_float(keys.reshape(-1, keys.shape[-1])[flat]),
            cpu_float(values.reshape(-1, values.shape[-1])[flat]),
        )

    def run(self, report: Any) -> Entries:
        """Find the values by Adam, starting from the module's present outputs. Raises EditError if it diverges."""
        rows = torch.arange(len(self.labels))
        target = self.labels.to(self.lm.device)
        with torch.no_grad(), record({"y": self.module}) as outputs:
            self.batch()
        before = outputs["y"]
        flat = self.batch.positions.to(before.device)
        values = before.reshape(-1, before.shape[-1])[flat].float().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([values], lr=self.params.lr)

        def insert_values(module: nn.Module, args: Any, output: Any) -> Any:
            y = first(output)
            changed = y.reshape(-1, y.shape[-1]).index_put((flat,), values.to(y.dtype))
            return with_first(output, changed.reshape(y.shape))

        with hooked([self.module.register_forward_hook(insert_values)]):
            for step in range(self.params.max_steps + 1):
                report(step / (self.params.max_steps + 1))
                logp = self.batch()[rows, target]
                if step == self.params.max_steps or bool(
                    (logp.detach().exp() >= self.params.stop_probability).all()
                ):
                    break
                loss = -logp.sum()
                if not torch.isfinite(loss):
                    raise EditError("the search for a value diverged; try a smaller params.lr")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        owners = torch.full((len(self.labels),), self.owner)
        return Entries(self.keys, cpu_float(values), self.radii, owners, self.labels)
