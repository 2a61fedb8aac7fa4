"""Hidden states of contrastive texts: all layers in one forward pass, pooled in the hooks to save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.errors import InvalidEdit
from editors.model.activations import first, hooked
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM, Prompt
from editors.progress import ReportProgress
from editors.steering.choices import Positions
from editors.steering.pairs import Pair

MAX_STATES = 2**30  # most bytes of pooled states


@dataclass(frozen=True)
class Side:
    """One text of a pair, after its prompt."""

    prompt: Prompt | None
    text: str


@dataclass(frozen=True)
class States:
    """The residual stream after every layer, pooled over each text, and its mean norms."""

    positive: Tensor  # (pairs, layers, d_model), float32 on the CPU
    negative: Tensor  # (pairs, layers, d_model)
    norms: Tensor  # (layers,) mean Euclidean norm over the texts' tokens without the first of each text

    @property
    def differences(self) -> Tensor:
        """Positive minus negative (pairs, layers, d_model)."""
        return self.positive - self.negative


def sides_of(lm: LM, pairs: Sequence[Pair]) -> list[tuple[Side, Side]]:
    """The two sides of every pair, with their prompt as the model reads it."""
    prompts = [None if not p.prompt else lm.prompt(p.prompt, chat=p.chat) for p in pairs]
    return [
        (Side(at, pair.positive.strip()), Side(at, pair.negative.strip()))
        for at, pair in zip(prompts, pairs, strict=True)
    ]


def tokens_of(lm: LM, side: Side) -> tuple[list[int], list[int]]:
    """(prompt ids, text ids) of one side. Of a text without a prompt, the first token counts as the prompt.

    So no state is read at the first token of an input: in many models it is huge, whatever the token is.
    """
    if side.prompt is None and not lm.decoder_reads_prompt:  # then no token is needed in front of a text
        side = Side(Prompt("", False, 0, ""), side.text)
    if side.prompt is not None:
        return lm.encode(side.prompt)[0], lm.answer_ids(side.prompt, side.text)
    ids = lm.encode(Prompt(side.text, False, 0, ""))[0]
    return (ids[:1], ids[1:]) if len(ids) > 1 else ([], ids)


def pair_states(
    lm: LM, pairs: Sequence[tuple[Side, Side]], positions: Positions, report: ReportProgress
) -> States:
    """States of both sides of every pair, averaged over the text's tokens or taken at its last token.

    Raises InvalidEdit for a text that is too long for the model, for more pairs than fit in memory, and
    for states that are not finite; and what `report` raises.
    """
    rows = [tokens_of(lm, side) for pair in pairs for side in pair]
    _check(lm, rows)
    pooled = torch.zeros(len(rows), lm.n_layers, lm.d_model)
    norms, count, done = torch.zeros(lm.n_layers, dtype=torch.float64), 0, 0
    for batch in lm.buckets([len(p) + len(a) for p, a in rows]):
        states, total, n = _pass(lm, [rows[i] for i in batch], positions)
        pooled[batch] = states
        norms, count, done = norms + total, count + n, done + len(batch)
        report(done / len(rows), f"read {done} of {len(rows)} texts")
    if not torch.isfinite(pooled).all():
        raise InvalidEdit(
            "the model's states are not finite numbers on these texts; load it in another dtype"
        )
    return States(pooled[0::2], pooled[1::2], (norms / max(count, 1)).float())


def _check(lm: LM, rows: Sequence[tuple[list[int], list[int]]]) -> None:
    size = len(rows) * lm.n_layers * lm.d_model * 4
    if size > MAX_STATES:
        fits = MAX_STATES // (lm.n_layers * lm.d_model * 8)
        raise InvalidEdit(f"{len(rows) // 2} pairs are too many for this model; send {fits} at most")
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    for i, (prompt, text) in enumerate(rows):
        side = f"pairs[{i // 2}].{'negative' if i % 2 else 'positive'}"
        if not text:
            raise InvalidEdit(f"{side} has no tokens")
        if longest is not None and len(prompt) + len(text) > longest:
            raise InvalidEdit(
                f"{side} has {len(prompt) + len(text)} tokens with its prompt; the model takes {longest}"
            )


@torch.no_grad()
def _pass(
    lm: LM, rows: Sequence[tuple[list[int], list[int]]], positions: Positions
) -> tuple[Tensor, Tensor, int]:
    """States (n, layers, d), sums of norms (layers,) and the number of tokens in these sums, of one batch."""
    inputs = answer_inputs(lm, rows)
    pool = torch.zeros(len(rows), inputs.width)
    counted = torch.zeros(len(rows), inputs.width)
    for i in range(len(rows)):
        start, end = inputs.answers(i).start, inputs.answers(i).stop
        pool[i, end - 1 if positions == "last" else start : end] = 1.0
        counted[i, min(1, end - 1) : end] = 1.0
    pool = (pool / pool.sum(1, keepdim=True)).to(lm.device)
    counted = counted.to(lm.device)
    states = torch.zeros(len(rows), lm.n_layers, lm.d_model)
    norms = torch.zeros(lm.n_layers, dtype=torch.float64)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = first(output).float()
            states[:, layer] = torch.einsum("nt,ntd->nd", pool.to(hidden.device), hidden).cpu()
            norms[layer] = float((hidden.norm(dim=-1) * counted.to(hidden.device)).sum())

        return hook

    with hooked([m.register_forward_hook(keep(i)) for i, m in enumerate(lm.layers)]):
        lm.base_model(**inputs.call)
    return states, norms, int(counted.sum())
