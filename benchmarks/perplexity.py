"""Perplexity of a long text, window by window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from editors.closed_form.keys import opening_rows


@torch.no_grad()
def perplexity_of(lm: Any, text: str, tokens: int = 4096, window: int = 256) -> float:
    """Of the first `tokens` tokens in windows of `window`, each behind the BOS token where prompts begin with one."""
    ids = lm.tokenizer(text[: tokens * 8], add_special_tokens=False)["input_ids"][:tokens]
    opening = [row[0] for row in opening_rows(lm)]
    total, count = 0.0, 0
    for row in _windows(ids, window):
        x = torch.tensor([[*opening, *row]], device=lm.device)
        logits = lm.head(lm.hidden(x, torch.ones_like(x))[0, len(opening) : -1]).float()
        total += float(torch.nn.functional.cross_entropy(logits, x[0, len(opening) + 1 :], reduction="sum"))
        count += len(row) - 1
    return round(math.exp(total / count), 4)


def _windows(ids: Sequence[int], window: int) -> Iterable[Sequence[int]]:
    return (ids[i : i + window] for i in range(0, len(ids) - 1, window) if len(ids[i : i + window]) > 1)
