"""What the methods built on the PEFT library's layers share.

The library's layers replace modules of the model while they are trained. Then the original modules are
put back; no weight of the model is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from editors.advice import Remedy
from editors.edit import Edit
from editors.errors import EditError
from editors.finetune.adapter import AdapterPatch, Piece
from editors.finetune.examples import examples, trained_texts
from editors.finetune.key_directions import ModuleKeys
from editors.finetune.train_params import GENTLER, STRONGER, TrainParams, last_trained, resolve_layers
from editors.finetune.training import LoopHooks, Training
from editors.method import EditContext, Editor
from editors.model.activations import hooked
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, with_training, with_training_of

ADAPTER = "default"  # PEFT's name of a layer's only adapter

P = TypeVar("P", bound=TrainParams)


class PeftLayer:
    """A PEFT layer around a module of the model."""

    def __init__(self, layer: Any, base: nn.Module) -> None:
        self.layer, self._base = layer, {id(p) for p in base.parameters()}

    def to_float32(self) -> PeftLayer:
        """Cast the adapter's own parameters, so that they train in float32 on a model of any dtype."""
        for p in self.layer.parameters():
            if id(p) not in self._base:
                p.data = p.data.float()
        return self

    def parameter_groups(self, lr: float, lora_a_factor: float) -> list[dict[str, Any]]:
        """The parameters to train, each with its step size: lora_A's is `lora_a_factor` times `lr`."""
        return [
            {"params": [p], "lr": lora_a_factor * lr if "lora_A" in name else lr}
            for name, p in self.layer.named_parameters()
            if id(p) not in self._base and p.requires_grad
        ]


class PeftEditor(Editor[P]):
    """Base of these methods: it trains one edit after the other, each on top of those before."""

    family = "finetune"
    stronger: ClassVar[tuple[Remedy, ...]] = STRONGER
    gentler: ClassVar[tuple[Remedy, ...]] = GENTLER
    at_subject: ClassVar[bool] = True  # at first the change acts only at the subject (see training.py)
    lora_a_factor: ClassVar[float] = 1.0  # step size of lora_A, in units of lora_B's
    depths: ClassVar[Sequence[float]]
    """Depths (0 to 1) of the layers that are adapted by default."""

    takes_experts: ClassVar[bool] = (
        False  # whether its layer also stands around the experts of a layer, as one map
    )

    def supports(self, lm: LM) -> str | None:
        if lm.edits_experts and not self.takes_experts:
            return (
                f"{self.name} stands around linear layers, and the experts of {lm.arch.family} are none; use lora, "
                "rome, memit or constrained instead"
            )
        return None

    def resolve(self, lm: LM, params: P) -> P:
        return params.model_copy(update={"layers": resolve_layers(lm, params, self.depths)})

    def compute(self, lm: LM, edits: Sequence[Edit], params: P, context: EditContext) -> Patch:
        params = self.resolve(lm, params)
        patch = self._patch(self._train_all(lm, edits, params, context), params)
        return with_training(patch, self.trained_on(edits, params))

    def trained_on(self, edits: Sequence[Edit], params: Any) -> list[list[str]]:
        return trained_texts(edits, params.example_options)

    def _make_layer(self, lm: LM, name: str, params: Any) -> PeftLayer:
        raise NotImplementedError

    def _initialise(self, layer: Any, keys: ModuleKeys, params: Any) -> None:
        """Set the adapter's initial values; by default they stay as the library sets them."""

    def _loop_hooks(self, layers: nn.ModuleList, params: Any) -> LoopHooks:
        return LoopHooks()

    def _result(self, layer: Any, params: Any) -> Any:
        """What the patch holds of a trained layer."""
        raise NotImplementedError

    def _patch(self, rows: Sequence[Any], params: Any) -> Patch:
        """The patch of the trained edits, from each edit's results by parameter."""
        raise NotImplementedError

    def _with_earlier(self, lm: LM, rows: Sequence[Any], params: P) -> AbstractContextManager[Any]:
        """The model with the edits trained so far."""
        return lm.patched({n: [row[n] for row in rows] for n in rows[0]} if rows else {})

    def _train_all(
        self, lm: LM, edits: Sequence[Edit], params: Any, context: EditContext
    ) -> list[dict[str, Any]]:
        """The result for each edit, by parameter."""
        names = [lm.mlp_out(i) for i in params.layers]
        rows: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            with self._with_earlier(lm, rows, params):
                rows.append(self._train(lm, names, edit, edits[:i], params, report))
        return rows

    def _train(
        self,
        lm: LM,
        names: Sequence[str],
        edit: Edit,
        earlier: Sequence[Edit],
        params: Any,
        report: Callable[[float], None],
    ) -> dict[str, Any]:
        rows = examples(lm, edit, params.example_options, earlier)
        training = Training(
            lm, rows, {n: lm.module(n) for n in names}, params.layers[0], last_trained(params)
        )
        with seeded(lm, params.seed):
            wrapped = {n: self._make_layer(lm, n, params).to_float32() for n in names}
        layers = {n: w.layer for n, w in wrapped.items()}
        for n, layer in layers.items():
            self._initialise(layer, training.keys[n], params)
        hooks = self._loop_hooks(nn.ModuleList(layers.values()), params)
        groups = [g for w in wrapped.values() for g in w.parameter_groups(params.lr, self.lora_a_factor)]
        with replaced(lm, layers), ExitStack() as stack:
            if self.at_subject:
                for layer in layers.values():
                    stack.enter_context(_masked(layer, training))
            training.run(torch.optim.Adam(groups), params, report, hooks)
        return {n: self._result(layer, params) for n, layer in layers.items()}


@contextmanager
def replaced(lm: LM, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules that hold the named weights; put the originals back at the end."""
    places = [(_parent(lm, name), name.split(".")[-2], layer) for name, layer in layers.items()]
    originals = [getattr(parent, child) for parent, child, _ in places]
    try:
        for parent, child, layer in places:
            setattr(parent, child, layer)
        yield
    finally:
        for (parent, child, _), original in zip(places, originals, strict=True):
            setattr(parent, child, original)


def _parent(lm: LM, name: str) -> nn.Module:
    parent: nn.Module = lm.model.get_submodule(".".join(name.split(".")[:-2]))
    return parent


@contextmanager
def seeded(lm: LM, seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` in this block, without changing the global generators."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _masked(layer: Any, training: Training) -> Iterator[None]:
    """Apply the training's mask to what a PEFT layer adds to its base layer's output."""
    base_output: list[Tensor] = []

    def record_base(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        base_output[:] = [output]

    def apply_mask(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        base = base_output.pop()
        return base + training.masked(output - base)

    base_hook = layer.base_layer.register_forward_hook(record_base)
    with hooked([base_hook, layer.register_forward_hook(apply_mask)]):
        yield


@contextmanager
def attached(lm: LM, rows: Sequence[Mapping[str, Piece]]) -> Iterator[None]:
    """The model with these adapters acting."""
    detach = AdapterPatch(rows).attach(lm)
    try:
        yield
    finally:
        detach()


def low_rank_patch(rows: Sequence[Mapping[str, LowRank]]) -> WeightPatch:
    """The edits' factors side by side. `info["ranks"]` has the rank of each edit, by parameter."""
    deltas: dict[str, Delta] = {
        n: LowRank(torch.cat([r[n].left for r in rows], 1), torch.cat([r[n].right for r in rows], 0))
        for n in rows[0]
    }
    ranks = {n: [r[n].left.shape[1] for r in rows] for n in rows[0]}
    return WeightPatch(deltas, info={"ranks": ranks})


def low_rank_rows(patch: Patch, rows: Sequence[int]) -> WeightPatch:
    """The patch with the factors of some edits only."""
    assert isinstance(patch, WeightPatch)
    refuse_imported(patch)
    ranks: dict[str, list[int]] = patch.info["ranks"]
    deltas: dict[str, Delta] = {
        n: d.select(rows, ranks[n]) for n, d in patch.deltas.items() if isinstance(d, LowRank)
    }
    some = WeightPatch(deltas, info={"ranks": {n: [ranks[n][i] for i in rows] for n in deltas}})
    return with_training_of(some, patch, rows)


def refuse_imported(patch: Patch) -> None:
    """Raise EditError for an imported adapter, whose edits cannot be separated."""
    if "imported" in patch.info:
        raise EditError("an imported adapter is one piece; revert or reapply all of its edits together")
