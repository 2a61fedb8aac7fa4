"""WISE: a side memory beside one projection, and a router that tells which tokens it answers.

Wang et al., NeurIPS 2024, arXiv 2405.14768: a copy W' of an MLP's output projection W learns the fact. A key k is
answered by W' where its routing activation ||(W' - W) k|| (equation 3) is over a threshold, and by W everywhere
else, untouched to the bit; margins keep the activations of both sides apart while W' is learned (equation 5).

Each edit has a memory of its own here (the paper's WISE-Retrieve, with one edit in each), so that it can be
forgotten alone, and W' - W is kept to the span of the keys it is learned at, so that it is small. It is trained,
as in the paper, or written in closed form, as ROME writes (Meng et al. 2022, eq. 2), which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.closed_form.defaults import default_layer, seq2seq_refusal
from editors.closed_form.values import ValueParams
from editors.closed_form.write_one import write
from editors.edit import Edit
from editors.facts import sentences
from editors.finetune.block_adam import BlockAdam
from editors.finetune.examples import examples, trained_texts
from editors.finetune.key_directions import key_directions
from editors.finetune.training import LoopHooks, Training, TrainParams, resolve_layers
from editors.memory.side_memory import Memories, SideMemoryPatch
from editors.method import EditContext, Editor
from editors.metric import RIDGE, Metric
from editors.model.activations import first, hooked, record, with_first
from editors.model.lm import LM
from editors.patch import Patch, cpu_float, with_training, with_training_of

DEPTH = (0.15,)  # early: there a subject's key is much the same in every wording
TEXTS = 60  # shipped facts, as sentences whose tokens the memory must not answer


class WiseParams(TrainParams):
    """Parameters of WISE."""

    learn: Literal["search", "train"] = Field(
        "search",
        description="search: the value is sought as ROME does and written for the subject's keys, in seconds (see "
        "`search`). train: by gradient, as published (all other fields but `layers` and `reach`).",
    )
    search: ValueParams = Field(ValueParams(), description="learn=search: how the value is sought.")
    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="The layer with the memory; None: at a sixth of the depth.",
    )
    lr: float = Field(0.05, gt=0, le=10, description="Step size: how far an entry of the memory moves.")
    margin: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="While the fact is learned, the routing activation of everything else is pushed below this share "
        "of the least one of what is learned.",
    )
    margin_weight: float = Field(0.1, ge=0, le=1000, description="Weight of that margin in the loss.")
    reach: float = Field(
        0.5,
        gt=0,
        le=1,
        description="The router's threshold as a share of the least activation learned with; smaller: more wordings, "
        "and more of what only looks like the subject (the paper: 1).",
    )


class Wise(Editor[WiseParams]):
    name = "wise"
    family = "memory"
    title = "Side memory with routing (WISE)"
    description = (
        "Teaches the fact to a small memory beside one MLP output projection and lets it answer at the tokens it "
        "knows, the subject's last in any wording; everywhere else the model is untouched to the bit."
    )
    source = "Wang et al., NeurIPS 2024, arXiv 2405.14768"
    when = (
        "When nothing else may move and yet other wordings shall be answered; for one fact about a subject."
    )
    cost = "As rome; a column per fact is kept, and looked at by every token. learn=train: as ft."
    kind = "sidememory"
    params = WiseParams

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def resolve(self, lm: LM, params: WiseParams) -> WiseParams:
        layers = resolve_layers(lm, params, DEPTH)
        if params.layers is None and params.learn == "search":
            layers = (default_layer(lm),)
        return params.model_copy(update={"layers": layers})

    def layers_needed(self, lm: LM, params: WiseParams) -> Sequence[int]:
        return (self.resolve(lm, params).layers or ()) if params.learn == "search" else ()

    def trained_on(self, edits: Sequence[Edit], params: WiseParams) -> list[list[str]]:
        if params.learn == "search":
            return super().trained_on(edits, params)
        return trained_texts(edits, params.example_options)

    def compute(self, lm: LM, edits: Sequence[Edit], params: WiseParams, context: EditContext) -> Patch:
        """One memory per edit, each learned beside those before it."""
        params = self.resolve(lm, params)
        assert params.layers is not None
        name = lm.mlp_out(params.layers[0])
        metric = Metric(None)
        if params.learn == "search":
            metric = context.statistics.metric(params.layers[0], RIDGE, "self")
        found: list[Memories] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            with ExitStack() as stack:
                if found:
                    stack.callback(SideMemoryPatch(name, Memories.join(found)).attach(lm))
                if params.learn == "search":
                    found.append(_searched(lm, params, edit, metric, report))
                else:
                    found.append(_Learning(lm, params, name, edit, edits[:i]).run(report))
        patch = SideMemoryPatch(name, Memories.join(found), info={"parameter": name})
        return with_training(patch, self.trained_on(edits, params))

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The other edits' memories are left out."""
        assert isinstance(patch, SideMemoryPatch)
        memories = patch.memories.select(rows)
        some = SideMemoryPatch(patch.parameter, memories, extra=patch.extra, info=patch.info)
        return with_training_of(some, patch, rows)


def _searched(
    lm: LM, params: WiseParams, edit: Edit, metric: Metric, report: Callable[[float], None]
) -> Memories:
    """A memory of one column: left is v* - W k, right answers all of the subject's keys with (nearly) 1."""
    assert params.layers is not None
    layer = params.layers[0]
    made = write(lm, layer, edit, params.search, metric, report)
    left, right = made.change.left.t().contiguous(), made.change.right.contiguous()
    least = (made.keys @ right.t()).abs().min() * left.norm()
    threshold = (params.reach * least).reshape(1)
    return Memories(left, right, torch.zeros(1, dtype=torch.long), cpu_float(threshold))


class _Learning:
    """One edit's memory: right is fixed, an orthonormal basis of its keys; left starts at zero."""

    def __init__(self, lm: LM, params: WiseParams, name: str, edit: Edit, learned: Sequence[Edit]) -> None:
        assert params.layers is not None
        self.lm, self.params, self.module = lm, params, lm.module(name)
        rows = examples(lm, edit, params.example_options, learned)
        self.training = Training(lm, rows, {name: self.module}, params.layers[0])
        seen = self.training.keys[name]
        seen = replace(seen, preserved=torch.cat([seen.preserved, self._unrelated(edit)]))
        directions = key_directions(seen, len(seen.target)).double()
        self.right = torch.linalg.qr(directions.t())[0].t().float().contiguous().to(lm.device)
        self.told, self.kept = seen.target @ self.right.t(), seen.preserved @ self.right.t()
        self.left = torch.zeros(len(self.right), lm.weight(name).shape[0], device=lm.device)
        self.left.requires_grad_(True)

    @torch.no_grad()
    def _unrelated(self, edit: Edit) -> Tensor:
        """Keys (tokens, d_in) of texts that say nothing about the subject."""
        lm = self.lm
        texts = [text for text in sentences() if edit.subject not in text][:TEXTS]
        ids, mask = lm.pad([lm.encode(lm.prompt(text, chat=False))[0] for text in texts])
        with record({"key": self.module}, inputs=True) as seen:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen["key"].reshape(-1, seen["key"].shape[-1])[mask.bool().reshape(-1)].float()

    def run(self, report: Callable[[float], None]) -> Memories:
        """The memory, learned; raises EditError when the loss diverges."""
        params, right, left = self.params, self.right, self.left

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            out = first(output)
            more = (args[0].float() @ right.t()) @ left
            if self.training.mask is None:  # as it will act
                more = more * (more.detach().norm(dim=-1, keepdim=True) >= self._threshold())
            else:
                more = self.training.masked(more)
            return with_first(output, out + more.to(out.dtype))

        with hooked([self.module.register_forward_hook(hook)]):
            optimiser = BlockAdam([left], params.lr)
            self.training.run(optimiser, params, report, LoopHooks(penalty=self._penalty))
        owners = torch.zeros(len(right), dtype=torch.long)
        return Memories(
            cpu_float(left), cpu_float(right), owners, cpu_float(self._threshold()[None].clamp(min=1e-9))
        )

    @torch.no_grad()
    def _threshold(self) -> Tensor:
        """Of the routing activation, a scalar; 0 before the first step, where all is let through."""
        least: Tensor = (self.told @ self.left).norm(dim=1).min()
        return self.params.reach * least

    def _penalty(self) -> Tensor:
        """The most active of what is kept, beyond the margin, as a share of the least active of what is told."""
        least = (self.told.detach() @ self.left.detach()).norm(dim=1).min().clamp(min=1e-6)
        most = (self.kept @ self.left).square().sum(1).max().add(1e-12).sqrt()
        over: Tensor = (most / least - self.params.margin).clamp(min=0)
        return self.params.margin_weight * over
