"""UltraEdit: a shift from one forward and backward pass per fact (Gu et al., 2025, arXiv 2505.14679)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from editors.advice import Preset, Remedy
from editors.closed_form.defaults import seq2seq_refusal
from editors.closed_form.prior_keys import rows_of
from editors.closed_form.solve import update
from editors.constants import assumed, from_shape
from editors.edit import Edit
from editors.errors import EditError
from editors.method import EditContext, Editor, Params
from editors.model.activations import folded, record, replace
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import Patch, WeightPatch

EPSILON = 1e-6

# The running statistics begin with these. They are not the canary texts, on which drift is measured.
NEUTRAL_TEXTS = (
    "The river flows through the valley and into the lake.",
    "Iron melts at a much higher temperature than tin.",
    "He closed the door quietly and walked down the street.",
    "for name in names:\n    print(name)",
    "Leonardo da Vinci painted pictures, among them the Mona Lisa.",
    "Rivers in the north of Russia are frozen for half of the year.",
    "Could you tell me when the next train leaves?",
    "Twenty divided by four is five.",
)


SHALLOWEST = assumed(0.55, "share of the depth at which the layers that UltraEdit changes begin")
DEEPEST = assumed(0.75, "share of the depth at which they end")


@from_shape("from SHALLOWEST to DEEPEST of the depth, one at least", "the layers that UltraEdit changes")
def default_layers(n_layers: int) -> tuple[int, ...]:
    """The layers to change in a model of `n_layers`."""
    first = round(SHALLOWEST * n_layers)
    return tuple(range(first, max(first + 1, round(DEEPEST * n_layers))))


class UltraEditParams(Params):
    """Parameters of UltraEdit."""

    layers: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="The layers whose MLPs are changed; None: those from 55% to 75% of the depth.",
    )
    lr: float = Field(
        assumed(
            6e-5,
            "size of UltraEdit's shift",
            "the authors' files have 1e-6, for models of 7 billion parameters and more; no comparison is known",
        ),
        gt=0,
        le=1,
        description="eta: the size of the shift. Larger says more and disturbs more.",
    )


@dataclass(frozen=True)
class Feature:
    """Of the tokens that predict the answers: one MLP output projection's inputs and its outputs' gradients."""

    keys: Tensor  # (tokens, d_in)
    gradients: Tensor  # (tokens, d_out)


class UltraEdit(Editor[UltraEditParams]):
    """v = -eta |h^|^2 g^ with [h^; g^] normalised over all that was ever edited; delta = V^T (H H^T + I)^-1 H."""

    name = "ultraedit"
    family = "closed_form"
    title = "Training-, subject- and memory-free lifelong editing"
    description = (
        "Reads each fact's hidden states and gradients in a single forward and backward pass, normalises them by the "
        "statistics of everything edited so far, and solves for the shift. The prompt needs no particular subject. "
        "The running statistics come from the active patches, so that a reverted edit leaves them too."
    )
    source = "Gu et al., 2025, arXiv 2505.14679"
    when = (
        "Very many facts over time where speed matters more than each one's reliability; no subject needed."
    )
    cost = "One forward and one backward pass per fact: tenths of a second of CPU on 135M parameters."
    batch = True
    stronger = (Remedy("lr", "shifts the weights further", factor=1.5, limit=1e-3),)
    gentler = (Remedy("lr", "shifts the weights less", factor=0.67, limit=1e-6),)
    published = Preset(
        {"lr": 1e-6},
        "the configuration files of Gu et al. 2025, arXiv 2505.14679, in EasyEdit (hparams/ULTRAEDIT). They choose the "
        "layers for each model: the output projections 29 and 30 of 32 in Mistral, elsewhere gate and up projections, "
        "which are not changed here; give layers as params.layers",
    )
    params = UltraEditParams

    def supports(self, lm: LM) -> str | None:
        return seq2seq_refusal(lm, self.name)

    def resolve(self, lm: LM, params: UltraEditParams) -> UltraEditParams:
        layers = params.layers or default_layers(lm.n_layers)
        for layer in layers:
            lm.mlp_out(layer)  # InvalidEdit for one that does not exist
        return params.model_copy(update={"layers": tuple(sorted(set(layers)))})

    def compute(self, lm: LM, edits: Sequence[Edit], params: UltraEditParams, context: EditContext) -> Patch:
        """One low-rank delta per layer; row i of the patch is edit i."""
        params = self.resolve(lm, params)
        names = [lm.mlp_out(layer) for layer in params.layers or ()]
        rows = [_tokens(lm, edit) for edit in edits]
        context.report(0.0, "gradients of neutral text")
        warm = _features(
            lm,
            names,
            [_neutral(lm, text) for text in NEUTRAL_TEXTS],
            lambda f: context.report(0.1 * f, "gradients"),
        )
        own = _features(
            lm, names, rows, lambda f: context.report(0.1 + 0.8 * f, f"gradients of {len(edits)} facts")
        )
        extra: dict[str, Tensor] = {"counts": torch.tensor([answer for _, answer in rows])}
        for name in names:
            seen = [warm[name], *_earlier(context, name)]
            extra |= {
                f"{name}:keys": own[name].keys,
                f"{name}:gradients": own[name].gradients,
                f"{name}:state": torch.stack([_sums(f) for f in seen]).sum(0),
            }
        context.report(0.95, "solving")
        return _solve(extra, {"lr": params.lr, "names": names})

    def subset(self, patch: Patch, rows: Sequence[int], statistics: Statistics) -> Patch:
        """Normalised and solved again from the stored features of these rows."""
        return _solve(*rows_of(patch, rows))


def _solve(extra: dict[str, Tensor], info: dict[str, Any]) -> WeightPatch:
    deltas: dict[str, LowRank] = {}
    for name in info["names"]:
        feature = Feature(extra[f"{name}:keys"], extra[f"{name}:gradients"])
        mean, deviation = _normaliser(extra[f"{name}:state"] + _sums(feature))
        z = (torch.cat([feature.keys, feature.gradients], 1).double() - mean) / (deviation + EPSILON)
        h, g = z.split([feature.keys.shape[1], feature.gradients.shape[1]], 1)
        values = -info["lr"] * h.square().sum(1, keepdim=True) * g  # (tokens, d_out) eq. 6
        deltas[name] = update(values.float(), feature.keys, feature.keys, 1.0, 0.0)
    return WeightPatch(deltas, extra=extra, info=info)


def _sums(feature: Feature) -> Tensor:
    """Count, sum and sum of squares of the features [h; g]: (3, d_in + d_out) in float64."""
    z = torch.cat([feature.keys, feature.gradients], 1).double()
    return torch.stack([torch.full_like(z[0], len(z)), z.sum(0), z.square().sum(0)])


def _normaliser(sums: Tensor) -> tuple[Tensor, Tensor]:
    mean = sums[1] / sums[0]
    return mean, (sums[2] / sums[0] - mean.square()).clamp(min=0).sqrt()


def _earlier(context: EditContext, name: str) -> Iterator[Feature]:
    """The features of active earlier edits at one weight."""
    for prior in context.prior:
        extra = prior.patch.extra
        if f"{name}:gradients" in extra:
            yield Feature(extra[f"{name}:keys"], extra[f"{name}:gradients"])


def _tokens(lm: LM, edit: Edit) -> tuple[list[int], int]:
    """Ids of prompt and target, and how many of them are the target's."""
    prompt, _ = lm.edit_prompt(edit)
    target = lm.answer_ids(prompt, edit.target)
    return [*lm.encode(prompt)[0], *target], len(target)


def _neutral(lm: LM, text: str) -> tuple[list[int], int]:
    ids = lm.encode(lm.prompt(text, chat=False))[0]
    return ids, len(ids) - 1


def _features(
    lm: LM, names: Sequence[str], rows: Sequence[tuple[list[int], int]], step: Callable[[float], None]
) -> dict[str, Feature]:
    """Keys and gradients at the tokens that predict the last `answer` ids of each row, in the rows' order."""
    features: list[dict[str, Feature] | None] = [None] * len(rows)
    done = 0
    for bucket in lm.buckets([len(ids) for ids, _ in rows]):
        for at in range(0, len(bucket), 16):
            batch = bucket[at : at + 16]
            step(done / len(rows))
            for i, feature in zip(batch, _pass(lm, names, [rows[i] for i in batch]), strict=True):
                features[i] = feature
            done += len(batch)
    every = [f for f in features if f is not None]
    return {
        name: Feature(torch.cat([f[name].keys for f in every]), torch.cat([f[name].gradients for f in every]))
        for name in names
    }


def _pass(
    lm: LM, names: Sequence[str], rows: Sequence[tuple[list[int], int]]
) -> Iterator[dict[str, Feature]]:
    """One forward and one backward pass; every row's loss is its own mean, whatever it is batched with."""
    ids, mask = lm.pad([r for r, _ in rows])
    modules = {name: lm.module(name) for name in names}
    zeros: dict[str, Tensor] = {}  # added to the outputs, so that there is something to differentiate by

    def adding(name: str) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return add

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(replace({module: adding(name) for name, module in modules.items()}))
        keys = stack.enter_context(record(modules, inputs=True))
        last = stack.enter_context(record({"last": lm.layers[-1]}, stop=True, detach=False))
        lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    states = folded(last["last"])
    loss = torch.zeros((), device=ids.device)
    for i, (row, answer) in enumerate(rows):
        logits = lm.head(states[i, len(row) - 1 - answer : len(row) - 1]).float()
        loss = loss + torch.nn.functional.cross_entropy(logits, ids[i, len(row) - answer : len(row)])
    if not torch.isfinite(loss):
        raise EditError("the loss of a fact is not finite; the model is broken or its precision too low")
    gradients = dict(zip(names, torch.autograd.grad(loss, [zeros[n] for n in names]), strict=True))
    for i, (row, answer) in enumerate(rows):
        places = slice(len(row) - 1 - answer, len(row) - 1)
        yield {
            name: Feature(
                _rows(keys[name], len(rows))[i, places].float().cpu(),
                _rows(gradients[name], len(rows))[i, places].float().cpu(),
            )
            for name in names
        }


def _rows(tensor: Tensor, n: int) -> Tensor:
    """(n, length, d), also where a family flattens its tokens."""
    return tensor.detach().reshape(n, -1, tensor.shape[-1])
