"""GRACE: a code book of keys, values and radii at one layer (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

Where the input of one MLP's output projection lies within the radius of a key, its output is the
key's value; everywhere else the model is untouched to the bit (the "deferral" of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.edit import Edit
from editors.errors import EditError, InvalidEdit
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import Example, ExampleOptions, examples, trained_texts
from editors.memory.code_book import CodeBookPatch, Entries
from editors.method import EditContext, Editor, Params
from editors.model.activations import first, hooked, record, with_first
from editors.model.lm import LM
from editors.patch import Patch, cpu_float, with_training, with_training_of

DEPTH = 0.7  # late enough that the last token knows the whole prompt


class GraceParams(Params):
    """Parameters of GRACE."""

    layer: int | None = Field(
        None, ge=0, description="The layer with the code book; None: at 70% of the depth."
    )
    radius: float = Field(
        0.3, gt=0, le=2, description="A new key's radius, in units of its norm (the paper's initial epsilon)."
    )
    margin: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="No radius reaches further than this share of the way to what must stay: the same prompt with "
        "other subjects, neighbours, unrelated text.",
    )
    max_steps: int = Field(60, ge=1, le=1000, description="Most steps of finding a value; it stops early.")
    lr: float = Field(0.5, gt=0, le=10, description="Adam's step size.")
    stop_probability: float = Field(0.95, gt=0, lt=1, description="Stop at this probability of every token.")
    use_probes: bool = Field(
        True, description="Also store the edit's paraphrases, and keep clear of its neighbours."
    )


class Grace(Editor[GraceParams]):
    name = "grace"
    family = "memory"
    title = "Code book of hidden states (GRACE)"
    description = (
        "Remembers the hidden state at the end of the prompt and what to put in its place so that the target comes "
        "out; a prompt that leads to (nearly) the same state is answered from the book, everything else by the model, "
        "untouched to the bit."
    )
    source = "Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031"
    when = "When nothing else may change at all; it answers the given wordings and hardly any other."
    cost = "Some ten passes through the upper layers; no statistics."
    kind = "codebook"
    params = GraceParams

    def resolve(self, lm: LM, params: GraceParams) -> GraceParams:
        layer = round(DEPTH * lm.n_layers) if params.layer is None else params.layer
        if layer >= lm.n_layers:
            raise InvalidEdit(
                f"params.layer {layer} does not exist; this model has layers 0 to {lm.n_layers - 1}"
            )
        return params.model_copy(update={"layer": layer})

    def trained_on(self, edits: Sequence[Edit], params: GraceParams) -> list[list[str]]:
        return trained_texts(edits, _options(params), rehearse=False)

    def compute(self, lm: LM, edits: Sequence[Edit], params: GraceParams, context: EditContext) -> Patch:
        """One entry per token of the target and wording, for each edit."""
        params = self.resolve(lm, params)
        assert params.layer is not None
        name = lm.mlp_out(params.layer)
        found: list[Entries] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            rows = [row.without_end for row in examples(lm, edit, _options(params))]
            found.append(_Search(lm, params, name, rows, i).run(report))
        parts = (torch.cat([getattr(e, n) for e in found]) for n in vars(found[0]))
        patch = CodeBookPatch(name, Entries(*parts), info={"parameter": name})
        return with_training(patch, self.trained_on(edits, params))

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The other edits' entries are left out; radii are settled anew from those that stay."""
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


class _Search:
    """Keys, radii and values of one edit."""

    def __init__(self, lm: LM, params: GraceParams, name: str, rows: Sequence[Example], owner: int) -> None:
        assert params.layer is not None
        self.lm, self.params, self.owner = lm, params, owner
        self.module = lm.module(name)
        told = [r for r in rows if r.answer]
        self.labels = torch.tensor([t for r in told for t in r.answer])
        self.keys, _ = self._states(told)
        others, _ = self._states([r for r in rows if not r.answer])
        distances = torch.cdist(self.keys, others, compute_mode="donot_use_mm_for_euclid_dist")
        limits = params.margin * distances.min(dim=1).values
        self.radii = torch.minimum(params.radius * self.keys.norm(dim=1), limits)
        self.tail = ExampleBatch(lm, params.layer, told)

    @torch.no_grad()
    def _states(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Inputs and outputs (columns that count, d) of the module."""
        assert self.params.layer is not None
        tail = ExampleBatch(self.lm, self.params.layer, rows)
        with record({"x": self.module}, inputs=True) as seen, record({"y": self.module}) as out:
            tail()
        keys, values = seen["x"], out["y"]
        flat = tail.positions.to(keys.device)
        return (
            cpu_float(keys.reshape(-1, keys.shape[-1])[flat]),
            cpu_float(values.reshape(-1, values.shape[-1])[flat]),
        )

    def run(self, report: Any) -> Entries:
        """Values by Adam, from the outputs as they are."""
        rows = torch.arange(len(self.labels))
        target = self.labels.to(self.lm.device)
        with torch.no_grad(), record({"y": self.module}) as out:
            self.tail()
        flat = self.tail.positions.to(out["y"].device)
        start = out["y"].reshape(-1, out["y"].shape[-1])[flat].float()
        values = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([values], lr=self.params.lr)

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            y = first(output)
            changed = y.reshape(-1, y.shape[-1]).index_put((flat,), values.to(y.dtype))
            return with_first(output, changed.reshape(y.shape))

        with hooked([self.module.register_forward_hook(put)]):
            for count in range(self.params.max_steps + 1):
                report(count / (self.params.max_steps + 1))
                logp = self.tail()[rows, target]
                if count == self.params.max_steps or bool(
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
