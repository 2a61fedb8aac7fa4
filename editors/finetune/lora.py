"""LoRA, rsLoRA, DoRA, AdaLoRA and IA3, with the layers of the PEFT library, as patches.

The library's layers stand in the model while they are trained and are taken out again, the
original modules put back where they were; no weight of the model is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from editors.edit import Edit
from editors.errors import EditError
from editors.finetune.adapter import AdapterPatch, Dora, Ia3, Piece, patch_rows
from editors.finetune.examples import examples, trained_texts
from editors.finetune.key_directions import ModuleKeys, key_directions
from editors.finetune.training import LoopHooks, Training, TrainParams, resolve_layers
from editors.method import EditContext, Editor, P
from editors.model.activations import hooked
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, cpu_float, with_training, with_training_of

DEPTHS = (0.15,)  # close to where rome edits by default
ADAPTER = "default"  # PEFT's name of the one adapter


class LoraParams(TrainParams):
    """Parameters of LoRA."""

    rank: int = Field(4, ge=1, le=256, description="Rank of the change of each weight.")
    alpha: float = Field(8.0, gt=0, le=4096, description="Scaling: alpha / rank.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    dora: bool = Field(
        False,
        description="Learn direction and length apart (DoRA); acts beside the weights, exported by patches.",
    )
    lr: float = Field(5e-3, gt=0, le=10, description="Adam's step size of lora_B; lora_A's is a sixteenth.")
    stride: float = Field(
        0.3, gt=0, le=10, description="How far one step moves the adapted output, in units of its own size."
    )


class AdaLoraParams(TrainParams):
    """Parameters of AdaLoRA."""

    initial_rank: int = Field(8, ge=2, le=256, description="Rank each weight starts with.")
    rank: int = Field(4, ge=1, le=255, description="Mean rank over the weights at the end.")
    orthogonality: float = Field(0.1, ge=0, le=100, description="Weight of the orthogonality of the factors.")
    lr: float = Field(2e-2, gt=0, le=10, description="Adam's step size.")


class Ia3Params(TrainParams):
    """Parameters of IA3."""

    lr: float = Field(3e-2, gt=0, le=10, description="Adam's step size.")
    max_steps: int = Field(60, ge=1, le=1000, description="Most optimisation steps; it stops early.")


@contextmanager
def standing_in(lm: LM, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of those that hold the named weights; the originals are back at the end."""
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
    found: nn.Module = lm.model.get_submodule(".".join(name.split(".")[:-2]))
    return found


@contextmanager
def seeded(lm: LM, seed: int) -> Iterator[None]:
    """A random generator of one's own while adapters are made."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Peft(Editor[P]):
    """What the methods on PEFT's layers share: one edit after the other, each on top of those before."""

    family = "finetune"
    gates: ClassVar[bool] = True  # learn the target at the subject's last token (see training.py)
    slower: ClassVar[float] = 1.0  # step size of the inputs' side over the outputs'

    def _before(self, lm: LM, rows: Sequence[Any], params: P) -> AbstractContextManager[Any]:
        """The model with the rows learned so far."""
        return lm.patched(_joined(rows))

    def trained_on(self, edits: Sequence[Edit], params: Any) -> list[list[str]]:
        return trained_texts(edits, params.example_options)

    def _learn_all(
        self, lm: LM, edits: Sequence[Edit], params: Any, context: EditContext
    ) -> list[dict[str, Any]]:
        names = [lm.mlp_out(i) for i in params.layers]
        rows: list[dict[str, Any]] = []
        for i, edit in enumerate(edits):

            def report(fraction: float, i: int = i, edit: Edit = edit) -> None:
                context.report((i + fraction) / len(edits), edit.subject)

            with self._before(lm, rows, params):
                rows.append(self._learn(lm, names, edit, edits[:i], params, report))
        return rows

    def _learn(
        self,
        lm: LM,
        names: Sequence[str],
        edit: Edit,
        learned: Sequence[Edit],
        params: Any,
        report: Callable[[float], None],
    ) -> dict[str, Any]:
        rows = examples(lm, edit, params.example_options, learned)
        training = Training(lm, rows, {n: lm.module(n) for n in names}, params.layers[0])
        with seeded(lm, params.seed):
            layers = {n: self._layer(lm, n, params).float_adapter() for n in names}
        for n, held in layers.items():
            self._start(held.module, training.keys[n], params)
        step = self._step(nn.ModuleList(h.module for h in layers.values()), params)
        moved = [p for h in layers.values() for p in h.trained(params.lr, self.slower)]
        with standing_in(lm, {n: h.module for n, h in layers.items()}), ExitStack() as stack:
            if self.gates:
                for held in layers.values():
                    stack.enter_context(_gated(held.module, training))
            training.run(torch.optim.Adam(moved), params, report, step)
        return {n: self._fold(h.module, params) for n, h in layers.items()}

    def _start(self, layer: Any, seen: ModuleKeys, params: Any) -> None:
        """Where training begins; the library's own choice unless a method knows better."""

    def _layer(self, lm: LM, name: str, params: Any) -> _Held:
        raise NotImplementedError

    def _step(self, layers: nn.ModuleList, params: Any) -> LoopHooks:
        return LoopHooks()

    def _fold(self, layer: Any, params: Any) -> Any:
        raise NotImplementedError


class _Held:
    """A PEFT layer around a module of the model."""

    def __init__(self, module: Any, base: nn.Module) -> None:
        self.module, self._base = module, {id(p) for p in base.parameters()}

    def float_adapter(self) -> _Held:
        """Train in float32 whatever the model's type."""
        for p in self.module.parameters():
            if id(p) not in self._base:
                p.data = p.data.float()
        return self

    def trained(self, lr: float, slower: float) -> list[dict[str, Any]]:
        """What is trained, each with its step size."""
        return [
            {"params": [p], "lr": slower * lr if "lora_A" in name else lr}
            for name, p in self.module.named_parameters()
            if id(p) not in self._base and p.requires_grad
        ]


@contextmanager
def _gated(layer: Any, training: Training) -> Iterator[None]:
    """Let a layer's change of its base's output act only where the training says."""
    plain: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        plain[:] = [output]

    def gate(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        base = plain.pop()
        return base + training.masked(output - base)

    with hooked([layer.base_layer.register_forward_hook(keep), layer.register_forward_hook(gate)]):
        yield


class Lora(_Peft[LoraParams]):
    name = "lora"
    slower = 1 / 16  # LoRA+ (arXiv 2402.12354)
    title = "Low-rank adaptation (LoRA, rsLoRA, DoRA)"
    description = (
        "Trains a low-rank change of a few MLP projections on the fact for a few steps, while the predictions for "
        "other subjects in the same sentence and on unrelated text are kept; it is then folded into the weights."
    )
    source = "Hu et al., ICLR 2022, arXiv 2106.09685; rsLoRA arXiv 2312.03732; DoRA arXiv 2402.09353"
    when = "Facts that rome refuses or misses (long answers, questions, encoder-decoder models)."
    cost = "Some ten passes over a dozen short sentences per fact; a small patch."
    params = LoraParams

    def resolve(self, lm: LM, params: LoraParams) -> LoraParams:
        return params.model_copy(update={"layers": resolve_layers(lm, params, DEPTHS)})

    def compute(self, lm: LM, edits: Sequence[Edit], params: LoraParams, context: EditContext) -> Patch:
        """One low-rank change (or, for DoRA, one adapter) per edit and layer."""
        params = self.resolve(lm, params)
        rows = self._learn_all(lm, edits, params, context)
        patch = AdapterPatch(rows) if params.dora else _low_rank(rows)
        return with_training(patch, self.trained_on(edits, params))

    def _before(self, lm: LM, rows: Sequence[Any], params: LoraParams) -> AbstractContextManager[Any]:
        return _attached(lm, rows) if params.dora else lm.patched(_joined(rows))

    def _layer(self, lm: LM, name: str, params: LoraParams) -> _Held:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        alpha: Any = params.alpha
        config = LoraConfig(
            r=params.rank,
            lora_alpha=alpha,
            use_rslora=params.rslora,
            use_dora=params.dora,
            fan_in_fan_out=lm.is_transposed(name),
        )
        base = lm.module(name)
        layer = Linear(
            base,
            ADAPTER,
            config,
            r=params.rank,
            lora_alpha=alpha,
            is_target_conv_1d_layer=lm.is_transposed(name),
        )
        return _Held(layer, base)

    def _start(self, layer: Any, seen: ModuleKeys, params: LoraParams) -> None:
        """lora_A begins at what tells the subject from all else, so that lora_B alone decides what is said.

        It is scaled so that one step of Adam moves the output by `stride` of its own size.
        """
        directions = key_directions(seen, params.rank)
        scale = params.stride * seen.output_rms / (params.lr * layer.scaling[ADAPTER])
        with torch.no_grad():
            weight = layer.lora_A[ADAPTER].weight
            weight.zero_()
            weight[: len(directions)] = (scale * directions).to(weight.device)

    def _fold(self, layer: Any, params: LoraParams) -> LowRank | Dora:
        left = cpu_float(layer.lora_B[ADAPTER].weight) * layer.scaling[ADAPTER]
        right = cpu_float(layer.lora_A[ADAPTER].weight)
        if params.dora:
            return Dora(left, right, cpu_float(layer.lora_magnitude_vector[ADAPTER].weight))
        return LowRank(left, right)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """Each edit has its own columns (or its own adapter); the others are left out."""
        _refuse_imported(patch)
        return _low_rank_rows(patch, rows) if isinstance(patch, WeightPatch) else patch_rows(patch, rows)


class AdaLora(_Peft[AdaLoraParams]):
    name = "adalora"
    title = "Adaptive low-rank adaptation (AdaLoRA)"
    description = (
        "Trains changes of the form P diag(E) Q on several MLP projections and shares the rank out among them by "
        "importance; it is then folded into the weights."
    )
    source = "Zhang et al., ICLR 2023, arXiv 2303.10512"
    when = "When it is not known which layers should change; lora is cheaper."
    cost = "As lora, over more layers."
    params = AdaLoraParams

    def resolve(self, lm: LM, params: AdaLoraParams) -> AdaLoraParams:
        return params.model_copy(update={"layers": resolve_layers(lm, params, (0.1, 0.15, 0.2, 0.3))})

    def compute(self, lm: LM, edits: Sequence[Edit], params: AdaLoraParams, context: EditContext) -> Patch:
        """One low-rank change per edit and layer; triplets without importance are left out."""
        patch = _low_rank(self._learn_all(lm, edits, self.resolve(lm, params), context))
        return with_training(patch, self.trained_on(edits, params))

    def _config(self, params: AdaLoraParams) -> Any:
        from peft import AdaLoraConfig

        total = params.max_steps
        return AdaLoraConfig(
            init_r=params.initial_rank,
            target_r=min(params.rank, params.initial_rank - 1),
            tinit=max(1, total // 10),
            tfinal=max(1, total // 2),
            deltaT=1,
            total_step=max(4, total),
            lora_alpha=params.initial_rank,
            orth_reg_weight=params.orthogonality,
        )

    def _layer(self, lm: LM, name: str, params: AdaLoraParams) -> _Held:
        from peft.tuners.adalora.layer import SVDLinear

        base, config = lm.module(name), self._config(params)
        config.fan_in_fan_out = lm.is_transposed(name)
        layer = SVDLinear(base, ADAPTER, config, r=params.initial_rank, lora_alpha=params.initial_rank)
        return _Held(layer, base)

    def _step(self, layers: nn.ModuleList, params: AdaLoraParams) -> LoopHooks:
        """The paper's schedule: importance is watched, the budget shrinks, then the rest is trained on."""
        from peft.tuners.adalora.layer import RankAllocator

        config = self._config(params)
        allocator: Any = _untyped(RankAllocator)(layers, config, ADAPTER)
        settled = config.total_step - config.tfinal

        def penalty() -> Tensor:
            total = torch.zeros(())
            for layer in map(_untyped, layers):
                for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].t()):
                    gram = side @ side.t()
                    total = total.to(gram.device) + (gram - torch.eye(len(gram), device=gram.device)).norm()
            return params.orthogonality * total / (2 * len(layers))

        pattern: dict[str, list[bool]] = {}

        def after(count: int) -> None:
            if count + 1 < settled:
                _, found = allocator.update_and_allocate(layers, count + 1)
                pattern.update(found or {})
            elif pattern:
                allocator.mask_using_rank_pattern(layers, pattern)

        return LoopHooks(penalty, after, lambda count: count >= min(settled, params.max_steps))

    def _fold(self, layer: Any, params: AdaLoraParams) -> LowRank:
        """scaling / (rank + 1e-5) * B diag(E) A, as the library's forward pass has it."""
        e = cpu_float(layer.lora_E[ADAPTER])[:, 0]
        scale = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
        alive = e.nonzero()[:, 0] if bool(e.any()) else torch.tensor([0])
        left = cpu_float(layer.lora_B[ADAPTER])[:, alive] * (e[alive] * scale)
        return LowRank(left.contiguous(), cpu_float(layer.lora_A[ADAPTER])[alive].contiguous())

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        return _low_rank_rows(patch, rows)


class Ia3Editor(_Peft[Ia3Params]):
    name = "ia3"
    gates = False  # its base is given scaled inputs, so that there is no plain output to keep
    title = "Learned scaling of activations (IA3)"
    description = (
        "Learns one factor for each hidden unit of several MLPs; the smallest of the adapters, and the weakest. Acts "
        "beside the weights."
    )
    source = "Liu et al., NeurIPS 2022, arXiv 2205.05638"
    when = "A baseline, where patches must be tiny and weights must not change."
    cost = "As lora, over all layers from the first adapted one on."
    kind = "adapter"
    params = Ia3Params

    def resolve(self, lm: LM, params: Ia3Params) -> Ia3Params:
        depths = [0.1 + 0.05 * i for i in range(9)]
        return params.model_copy(update={"layers": resolve_layers(lm, params, depths)})

    def compute(self, lm: LM, edits: Sequence[Edit], params: Ia3Params, context: EditContext) -> Patch:
        """One vector of factors per edit and layer."""
        patch = AdapterPatch(self._learn_all(lm, edits, self.resolve(lm, params), context))
        return with_training(patch, self.trained_on(edits, params))

    def _before(self, lm: LM, rows: Sequence[Any], params: Ia3Params) -> AbstractContextManager[Any]:
        return _attached(lm, rows)

    def _layer(self, lm: LM, name: str, params: Ia3Params) -> _Held:
        from peft import IA3Config
        from peft.tuners.ia3.layer import Linear

        base = lm.module(name)
        config = IA3Config(fan_in_fan_out=lm.is_transposed(name))
        return _Held(Linear(base, ADAPTER, config, is_feedforward=True), base)

    def _fold(self, layer: Any, params: Ia3Params) -> Ia3:
        return Ia3(cpu_float(layer.ia3_l[ADAPTER]).flatten())

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """Each edit has its own factors; the others are left out."""
        _refuse_imported(patch)
        return patch_rows(patch, rows)


def _untyped(value: Any) -> Any:
    """For the parts of the library without types."""
    return value


@contextmanager
def _attached(lm: LM, rows: Sequence[Mapping[str, Piece]]) -> Iterator[None]:
    detach = AdapterPatch(rows).attach(lm)
    try:
        yield
    finally:
        detach()


def _joined(rows: Sequence[Mapping[str, LowRank]]) -> dict[str, list[Delta]]:
    return {n: [r[n] for r in rows] for n in rows[0]} if rows else {}


def _low_rank(rows: Sequence[Mapping[str, LowRank]]) -> WeightPatch:
    """The edits' factors side by side; `info` has how many columns each has."""
    deltas = {
        n: LowRank(torch.cat([r[n].left for r in rows], 1), torch.cat([r[n].right for r in rows], 0))
        for n in rows[0]
    }
    ranks = {n: [r[n].left.shape[1] for r in rows] for n in rows[0]}
    return WeightPatch(deltas, info={"ranks": ranks})


def _refuse_imported(patch: Patch) -> None:
    if "imported" in patch.info:
        raise EditError("an imported adapter is one piece; revert or reapply all of its edits together")


def _low_rank_rows(patch: Patch, rows: Sequence[int]) -> WeightPatch:
    assert isinstance(patch, WeightPatch)
    _refuse_imported(patch)
    ranks: dict[str, list[int]] = patch.info["ranks"]
    kept: list[dict[str, LowRank]] = []
    for i in rows:
        row: dict[str, LowRank] = {}
        for name, delta in patch.deltas.items():
            assert isinstance(delta, LowRank)
            at = sum(ranks[name][:i])
            take = slice(at, at + ranks[name][i])
            row[name] = LowRank(delta.left[:, take].contiguous(), delta.right[take].contiguous())
        kept.append(row)
    return with_training_of(_low_rank(kept), patch, rows)
