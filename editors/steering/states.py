"""Hidden states of contrastive texts, over all layers in one pass and pooled while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editors.errors import InvalidEdit
from editors.model.activations import first, hooked
from editors.model.lm import LM, Prompt
from editors.progress import ReportProgress
from editors.steering.choices import Positions
from editors.steering.pairs import Pair

MAX_STATES = 2**30  # bytes of pooled states kept at once


@dataclass(frozen=True)
class Side:
    """One text of a pair, after its prompt."""

    prompt: Prompt | None
    text: str


@dataclass(frozen=True)
class States:
    """Pooled residual stream after every layer, and how long its vectors are there."""

    positive: Tensor  # (pairs, layers, d_model), float32 on the CPU
    negative: Tensor  # (pairs, layers, d_model)
    norms: Tensor  # (layers,) mean Euclidean norm over the texts' tokens, the first of each text apart

    @property
    def differences(self) -> Tensor:  # (pairs, layers, d_model)
        return self.positive - self.negative


def sides_of(lm: LM, pairs: Sequence[Pair]) -> list[tuple[Side, Side]]:
    """Pairs in the form the model reads."""
    prompts = [None if not p.prompt else lm.prompt(p.prompt, chat=p.chat) for p in pairs]
    return [
        (Side(at, pair.positive.strip()), Side(at, pair.negative.strip()))
        for at, pair in zip(prompts, pairs, strict=True)
    ]


def tokens_of(lm: LM, side: Side) -> tuple[list[int], list[int]]:
    """(prompt ids, text ids) of one side; of a text alone, its first token counts as the prompt.

    Nothing is read at the first token of a text: many models keep a huge state there, whatever it is.
    """
    if lm.is_seq2seq:
        asked = side.prompt or Prompt("", False, 0, "")
        return lm.encode(asked)[0], lm.answer_ids(asked, side.text)
    if side.prompt is not None:
        return lm.encode(side.prompt)[0], lm.answer_ids(side.prompt, side.text)
    ids = lm.encode(Prompt(side.text, False, 0, ""))[0]
    return (ids[:1], ids[1:]) if len(ids) > 1 else ([], ids)


def pair_states(
    lm: LM, pairs: Sequence[tuple[Side, Side]], positions: Positions, report: ReportProgress
) -> States:
    """States of both sides of every pair, averaged over the text's tokens or taken at its last one.

    Raises InvalidEdit for texts longer than the model takes and for more than fits in memory.
    """
    rows = [tokens_of(lm, side) for pair in pairs for side in pair]
    _check(lm, rows)
    pooled = torch.zeros(len(rows), lm.n_layers, lm.d_model)
    norms, count, done = torch.zeros(lm.n_layers, dtype=torch.float64), 0, 0
    for batch in lm.buckets([len(p) + len(a) for p, a in rows]):
        chosen = [rows[i] for i in batch]
        states, total, n = _pass(lm, chosen, positions)
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
    room = getattr(lm.model.config, "max_position_embeddings", None)
    for i, (prompt, text) in enumerate(rows):
        side = f"pairs[{i // 2}].{'negative' if i % 2 else 'positive'}"
        if not text:
            raise InvalidEdit(f"{side} has no tokens")
        if room is not None and len(prompt) + len(text) > room:
            raise InvalidEdit(
                f"{side} has {len(prompt) + len(text)} tokens with its prompt; the model takes {room}"
            )


@torch.no_grad()
def _pass(
    lm: LM, rows: Sequence[tuple[list[int], list[int]]], positions: Positions
) -> tuple[Tensor, Tensor, int]:
    """(states (n, layers, d), summed norms (layers,), tokens counted) of one batch."""
    inputs, spans = _inputs(lm, rows)
    width = inputs["width"]
    pool = torch.zeros(len(rows), width)
    seen = torch.zeros(len(rows), width)
    for i, (start, end) in enumerate(spans):
        pool[i, end - 1 if positions == "last" else start : end] = 1.0
        seen[i, min(1, end - 1) : end] = 1.0
    pool = (pool / pool.sum(1, keepdim=True)).to(lm.device)
    seen = seen.to(lm.device)
    states = torch.zeros(len(rows), lm.n_layers, lm.d_model)
    norms = torch.zeros(lm.n_layers, dtype=torch.float64)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = first(output).float()
            states[:, layer] = torch.einsum("nt,ntd->nd", pool.to(hidden.device), hidden).cpu()
            norms[layer] = float((hidden.norm(dim=-1) * seen.to(hidden.device)).sum())

        return hook

    with hooked([m.register_forward_hook(keep(i)) for i, m in enumerate(lm.layers)]):
        inputs["run"]()
    return states, norms, int(seen.sum())


def _inputs(
    lm: LM, rows: Sequence[tuple[list[int], list[int]]]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """How to run a batch, and where in the layers' output each text lies (start, end)."""
    if lm.is_seq2seq:
        ids, mask = lm.pad([p for p, _ in rows])
        start = lm.model.config.decoder_start_token_id
        decoder, decoder_mask = lm.pad([[start, *a] for _, a in rows])
        run = lambda: lm.model(  # noqa: E731
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=decoder,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        )
        return {"run": run, "width": decoder.shape[1]}, [(1, 1 + len(a)) for _, a in rows]
    ids, mask = lm.pad([p + a for p, a in rows])
    run = lambda: lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # noqa: E731
    return {"run": run, "width": ids.shape[1]}, [(len(p), len(p) + len(a)) for p, a in rows]
