"""WISE: a side memory beside one projection, and a router that decides which tokens it answers.

Wang et al., NeurIPS 2024, arXiv 2405.14768: a copy W' of an MLP's output projection W learns the fact. W'
answers a key k where its routing activation ||(W' - W) k|| (equation 3) is over a threshold. Everywhere else
the model computes exactly what it did before. While W' is learned, a margin separates the activations of both
sides (equation 5).

Here each edit has a memory of its own (the paper's WISE-Retrieve, with one edit in each), so that it can be
reverted alone. W' - W is restricted to the span of the keys it is learned at, so that it is small. It is trained
as in the paper, or written in closed form as ROME does (Meng et al. 2022, eq. 2), which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.advice import Preset, Remedy
from editors.closed_form.defaults import default_layer, refuse_unread, seq2seq_refusal
from editors.closed_form.keys import holding_the_opening
from editors.closed_form.value_params import ValueParams, fitted
from editors.closed_form.write_one import write
from editors.constants import assumed
from editors.edit import Edit
from editors.facts import sentences
from editors.finetune.block_adam import BlockAdam
from editors.finetune.examples import examples, trained_texts
from editors.finetune.key_directions import key_directions
from editors.finetune.train_params import EARLY, TrainParams, resolve_layers
from editors.finetune.training import LoopHooks, Training
from editors.memory.side_memory import Memories, SideMemoryPatch
from editors.method import EditContext, Editor
from editors.metric import RIDGE, Inverse, Metric
from editors.model.activations import first, hooked, record, with_first
from editors.model.lm import LM
from editors.patch import Patch, cpu_float, with_training, with_training_of

TEXTS = assumed(
    60,
    "how many shipped facts give keys that a trained memory must not answer",
    "enough tokens of many kinds in one batch; no comparison is known",
)
STRONGER = (Remedy("reach", "lets the memory answer more wordings", factor=0.7, limit=0.15, widens=True),)
GENTLER = (Remedy("reach", "lets the memory answer fewer tokens", factor=1.25, limit=1.0),)


class WiseParams(TrainParams):
    """Parameters of WISE."""

    learn: Literal["search", "train"] = Field(
        "search",
        description="search: find the value as ROME does and write it for the subject's keys, in seconds (see "
        "`search`). train: train the memory as in the paper; all fields but `search` apply.",
    )
    search: ValueParams = Field(ValueParams(), description="learn=search: how the value is searched for.")
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="The layer with the memory; None: at a sixth of the depth.",
    )
    lr: float = Field(
        assumed(0.05, "step size of wise's training"),
        gt=0,
        le=10,
        description="Step size: how far an entry of the memory moves in a step.",
    )
    margin: float = Field(
        assumed(0.25, "wise's margin between routing activations", "below `reach`, with room to spare"),
        gt=0,
        lt=1,
        description="learn=train: the routing activations of preserved texts are pushed below this share of the "
        "smallest one in the target's prompts.",
    )
    margin_weight: float = Field(
        assumed(0.1, "weight of wise's margin in the loss"),
        ge=0,
        le=1000,
        description="Weight of that margin in the loss.",
    )
    reach: float = Field(
        assumed(
            0.5,
            "wise's threshold, as a share of the smallest activation it was learned with",
            "lower than the paper's 1, so that the memory also answers wordings it was not learned with",
        ),
        gt=0,
        le=1,
        description="The router's threshold as a share of the smallest activation in learning. A smaller share answers "
        "more wordings, and more names that only resemble the subject (the paper: 1).",
    )


class Wise(Editor[WiseParams]):
    name = "wise"
    family = "memory"
    title = "Side memory with routing (WISE)"
    description = (
        "Writes the fact into a small memory beside one MLP output projection. The memory answers at the subject's "
        "last token, in any wording; at every other token the model computes exactly what it did before."
    )
    source = "Wang et al., NeurIPS 2024, arXiv 2405.14768"
    when = (
        "When nothing else may change and other wordings must be answered too; for one fact about a subject."
    )
    cost = "As rome; each fact adds a column that every token is compared with. learn=train: as ft."
    kind = "sidememory"
    stronger = STRONGER
    gentler = GENTLER
    published = Preset(
        {"learn": "train", "reach": 1.0, "use_probes": False},
        "Wang et al., NeurIPS 2024: the memory is trained, and its threshold is the smallest activation of the edit; "
        "the margin is this project's own",
    )
    params = WiseParams

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def resolve(self, lm: LM, params: WiseParams) -> WiseParams:
        layers = resolve_layers(lm, params, EARLY)
        if params.layers is None and params.learn == "search":
            layers = (default_layer(lm),)
        if params.learn == "search":
            refuse_unread(lm, layers)
        return params.model_copy(update={"layers": layers, "search": fitted(lm, params.search)})

    def layers_needed(self, lm: LM, params: WiseParams) -> Sequence[int]:
        return (self.resolve(lm, params).layers or ()) if params.learn == "search" else ()

    def trained_on(self, edits: Sequence[Edit], params: WiseParams) -> list[list[str]]:
        if params.learn == "search":
            return super().trained_on(edits, params)
        return trained_texts(edits, params.example_options)

    def compute(self, lm: LM, edits: Sequence[Edit], params: WiseParams, context: EditContext) -> Patch:
        """One memory per edit, each learned with the earlier ones attached."""
        params = self.resolve(lm, params)
        assert params.layers is not None
        name = lm.mlp_out(params.layers[0])
        metric: Inverse = Metric(None)
        if params.learn == "search":
            metric = context.statistics.metric(params.layers[0], RIDGE, "self")
            metric = holding_the_opening(lm, params.layers[0], metric)
        memories: list[Memories] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            with ExitStack() as stack:
                if memories:
                    stack.callback(SideMemoryPatch(name, Memories.join(memories)).attach(lm))
                if params.learn == "search":
                    memories.append(_written(lm, params, edit, metric, report))
                else:
                    memories.append(_MemoryTraining(lm, params, name, edit, edits[:i]).run(report))
        patch = SideMemoryPatch(name, Memories.join(memories), info={"parameter": name})
        return with_training(patch, self.trained_on(edits, params))

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The memories of these edits only."""
        assert isinstance(patch, SideMemoryPatch)
        memories = patch.memories.select(rows)
        some = SideMemoryPatch(patch.parameter, memories, extra=patch.extra, info=patch.info)
        return with_training_of(some, patch, rows)


def _written(
    lm: LM, params: WiseParams, edit: Edit, metric: Inverse, report: Callable[[float], None]
) -> Memories:
    """A memory of one column: left is v* - W k, and right gives (nearly) 1 for each of the subject's keys."""
    assert params.layers is not None
    layer = params.layers[0]
    written = write(lm, layer, edit, params.search, metric, report)
    left, right = written.change.left.t().contiguous(), written.change.right.contiguous()
    smallest = (written.keys @ right.t()).abs().min() * left.norm()
    threshold = (params.reach * smallest).reshape(1)
    return Memories(left, right, torch.zeros(1, dtype=torch.long), cpu_float(threshold))


class _MemoryTraining:
    """Trains one edit's memory. `right` is fixed, an orthonormal basis of its keys; `left` starts at zero."""

    def __init__(self, lm: LM, params: WiseParams, name: str, edit: Edit, earlier: Sequence[Edit]) -> None:
        assert params.layers is not None
        self.lm, self.params, self.module = lm, params, lm.module(name)
        rows = examples(lm, edit, params.example_options, earlier)
        self.training = Training(lm, rows, {name: self.module}, params.layers[0])
        keys = self.training.keys[name]
        keys = replace(keys, preserved=torch.cat([keys.preserved, self._unrelated(edit)]))
        directions = key_directions(keys, len(keys.target)).double()
        self.right = torch.linalg.qr(directions.t())[0].t().float().contiguous().to(lm.device)
        # The keys' coordinates in that basis, (keys, m).
        self.target, self.preserved = keys.target @ self.right.t(), keys.preserved @ self.right.t()
        self.left = torch.zeros(len(self.right), lm.shape(name)[0], device=lm.device)
        self.left.requires_grad_(True)

    @torch.no_grad()
    def _unrelated(self, edit: Edit) -> Tensor:
        """Keys (tokens, d_in) of texts that do not mention the subject."""
        lm = self.lm
        texts = [text for text in sentences() if edit.subject not in text][:TEXTS]
        ids, mask = lm.pad([lm.encode(lm.prompt(text, chat=False))[0] for text in texts])
        with record({"key": self.module}, inputs=True) as inputs:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        keys = inputs["key"]
        return keys.reshape(-1, keys.shape[-1])[mask.bool().reshape(-1)].float()

    def run(self, report: Callable[[float], None]) -> Memories:
        """Train the memory. Raises EditError when the loss diverges."""
        params, right, left = self.params, self.right, self.left

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            change = (args[0].float() @ right.t()) @ left
            if self.training.mask is None:  # routed, as it will be once applied
                change = change * (change.detach().norm(dim=-1, keepdim=True) >= self._threshold())
            else:
                change = self.training.masked(change)
            return with_first(output, out + change.to(out.dtype))

        with hooked([self.module.register_forward_hook(hook)]):
            optimiser = BlockAdam([left], params.lr)
            self.training.run(optimiser, params, report, LoopHooks(penalty=self._penalty))
        owners = torch.zeros(len(right), dtype=torch.long)
        return Memories(
            cpu_float(left), cpu_float(right), owners, cpu_float(self._threshold()[None].clamp(min=1e-9))
        )

    @torch.no_grad()
    def _threshold(self) -> Tensor:
        """The router's threshold, a scalar. It is 0 before the first step, and lets every token through."""
        smallest: Tensor = (self.target @ self.left).norm(dim=1).min()
        return self.params.reach * smallest

    def _penalty(self) -> Tensor:
        """How far the largest preserved activation, as a share of the smallest target one, exceeds the margin."""
        smallest = (self.target.detach() @ self.left.detach()).norm(dim=1).min().clamp(min=1e-6)
        largest = (self.preserved @ self.left).square().sum(1).max().add(1e-12).sqrt()
        excess: Tensor = (largest / smallest - self.params.margin).clamp(min=0)
        return self.params.margin_weight * excess
