"""ROME as its paper writes it, and nothing more: the baseline our own is measured against.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022 (arXiv 2202.05262),
section 3.1 and appendix E.5. Written from the paper for this comparison: every step is a forward pass
of the whole model over every context and a backward pass through all of it, for a fixed number
of steps. `frozen=True` leaves out the gradients of the weights, which nothing uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.edit import Edit
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import WeightPatch


@dataclass(frozen=True)
class PlainParams:
    """The paper's settings."""

    layer: int
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0  # most |delta|, in units of |W k|
    prefixes: tuple[tuple[int, int], ...] = ((10, 5), (10, 10))  # (how many, of how many tokens)
    frozen: bool = False


class PlainRome:
    """One fact at a time, on one model; the random prefixes are generated once, as the paper does."""

    def __init__(self, lm: LM, moment: Tensor, params: PlainParams) -> None:
        """`moment` is C = E[k k^T] (d_in, d_in) of the layer's keys."""
        self.lm, self.params = lm, params
        self.parameter = lm.mlp_out(params.layer)
        self.inverse = torch.linalg.inv(moment.double()).float()  # C^-1
        self.prefixes = ["", *self._random_prefixes()]

    def _random_prefixes(self) -> list[str]:
        """Sentence openings sampled from the model."""
        lm, found = self.lm, []
        start = lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id
        for count, length in self.params.prefixes:
            with torch.random.fork_rng():
                torch.manual_seed(length)
                ids = torch.full((count, 1), start, device=lm.device)
                out = lm.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    min_new_tokens=length,
                    max_new_tokens=length,
                    pad_token_id=start,
                )
            found += [text + ". " for text in lm.tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)]
        return found

    def compute(self, edit: Edit) -> WeightPatch:
        """The rank-one update of eq. 2 for one edit; the model is left as it was."""
        with _trainable(self.lm.model, not self.params.frozen):
            value, key, now = self._target_value(edit)
        u = self.inverse @ key
        left = (value - now)[:, None]  # Lambda: (d_out, 1)
        right = (u / (u @ key))[None, :]  # (1, d_in)
        return WeightPatch({self.parameter: LowRank(left.contiguous(), right.contiguous())})

    def _rows(self, edit: Edit) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """ids, mask, labels (-100 but at the target), each (prefixes + 1, length); last subject tokens."""
        lm, rows, labels, places = self.lm, [], [], []
        start, end = edit.span
        for prefix in self.prefixes:
            prompt = lm.prompt(prefix + edit.text, chat=False)
            own, target = lm.encode(prompt)[0], lm.answer_ids(prompt, edit.target)
            rows.append(own + target[:-1])
            labels.append([-100] * (len(own) - 1) + target)
            places.append(lm.last_subject_token(prompt, (start + len(prefix), end + len(prefix))))
        essence = lm.prompt(f"{edit.subject} is a", chat=False)
        rows.append(lm.encode(essence)[0])
        labels.append([-100] * len(rows[-1]))
        places.append(lm.last_subject_token(essence, (0, len(edit.subject))))
        ids, mask = lm.pad(rows)
        padded = torch.full(ids.shape, -100)
        for i, row in enumerate(labels):
            padded[i, : len(row)] = torch.tensor(row)
        return ids, mask, padded.to(ids.device), places

    def _target_value(self, edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
        """v* (d_out,) by eq. 4, and k* (d_in,) by eq. 3 with W k*."""
        p, lm = self.params, self.lm
        ids, mask, labels, places = self._rows(edit)
        told, essence = len(places) - 1, int(mask[-1].sum()) - 1
        with torch.no_grad(), _varied(lm.module(self.parameter), places, None) as seen:
            base = lm.model(input_ids=ids, attention_mask=mask).logits[-1, essence].log_softmax(-1)
        key, now = seen["in"][:told].mean(0), seen["out"][:told].mean(0)
        delta = torch.zeros_like(now, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=p.lr)
        for _ in range(p.steps):
            optimiser.zero_grad()
            with _varied(lm.module(self.parameter), places, delta):
                logp = lm.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            picked = logp[:told].gather(2, labels[:told].clamp(min=0)[..., None])[..., 0]
            wanted = labels[:told] >= 0
            nll = -((picked * wanted).sum(1) / wanted.sum(1)).mean()
            kl = nn.functional.kl_div(base, logp[-1, essence], log_target=True, reduction="sum")
            loss = nll + p.kl_factor * kl + p.weight_decay * delta.norm() / now.norm() ** 2
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                delta.mul_((p.clamp * now.norm() / delta.norm()).clamp(max=1.0))
        return now + delta.detach(), key, now


@contextmanager
def _trainable(model: Any, wanted: bool) -> Iterator[None]:
    """Every parameter with gradients, as a model has them when loaded; put back at the end."""
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def _varied(module: nn.Module, places: Sequence[int], delta: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """Add `delta` to the module's output at one token per row; yields its input and output there."""
    seen: dict[str, Tensor] = {}
    rows = torch.arange(len(places))
    at = torch.tensor(list(places))

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shaped = output.view(len(places), -1, output.shape[-1])  # OPT flattens its tokens here
        seen["in"] = args[0].view(len(places), -1, args[0].shape[-1])[rows, at]
        seen["out"] = shaped[rows, at]
        if delta is None:
            return output
        changed = shaped.clone()
        changed[rows, at] = shaped[rows, at] + delta
        return changed.view_as(output)

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
