"""Answers scored after prompts that have been read already: only the answers' own tokens go through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editors.constants import limit
from editors.model.activations import record
from editors.model.said import Score
from editors.model.spoken_model import SpokenModel

AT_ONCE = limit(
    64,
    "answers that are scored after read prompts in one pass, at most",
    "the memory of their keys and values, which are a copy of the prompts'",
)


@torch.no_grad()
def scores_after(
    lm: SpokenModel,
    logits: Tensor,
    mask: Tensor,
    cache: Any,
    start: int,
    answers: Sequence[Sequence[Sequence[int]]],
) -> list[list[Score]]:
    """The scores of each row's answers; the cache stays as it is.

    Of a decoder-only model that attends to all columns of its cache.

    Args:
        logits: (n, vocabulary) of the token after each prompt.
        mask: (rows of the cache, columns) 1 where a column counts.
        start: the row of the cache with the first of the n prompts.
        answers: for each row, the token ids of every answer.
    """
    first = logits.float().log_softmax(-1)
    found: list[list[Any]] = [[None] * len(each) for each in answers]
    longer: list[tuple[int, int]] = []  # row, and which of its answers
    for row, each in enumerate(answers):
        for i, ids in enumerate(each):
            own = first[row, ids[0]]
            found[row][i] = Score(float(own), len(ids), int((first[row] > own).sum()))
            if len(ids) > 1:
                longer.append((row, i))
    longer.sort(key=lambda at: len(answers[at[0]][at[1]]))
    for begin in range(0, len(longer), AT_ONCE):
        some = longer[begin : begin + AT_ONCE]
        rest = _rest(lm, mask, cache, [start + row for row, _ in some], [answers[row][i] for row, i in some])
        for (row, i), more in zip(some, rest, strict=True):
            score = found[row][i]
            found[row][i] = Score(score.logprob + more, score.tokens, score.rank)
    return found


def _rest(
    lm: SpokenModel, mask: Tensor, cache: Any, rows: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Log-probability of each answer's tokens but the first, after the prompts of `rows`."""
    ids, own = lm.pad([answer[:-1] for answer in answers])
    at = torch.tensor(rows, device=mask.device)
    copy = DynamicCache()
    for n, layer in enumerate(cache.layers):
        here = at.to(layer.keys.device)
        copy.update(layer.keys[here], layer.values[here], n)
    whole = torch.cat([mask[at], own], 1)
    positions = (whole.cumsum(1) - 1)[:, -ids.shape[1] :]
    with record({"last": lm.layers[-1]}) as seen:
        lm.base_model(
            input_ids=ids,
            attention_mask=whole,
            position_ids=positions,
            past_key_values=copy,
            use_cache=True,
        )
    hidden = seen["last"].to(lm.device)
    told = []
    for i, answer in enumerate(answers):
        logp = lm.head(hidden[i, : len(answer) - 1]).float().log_softmax(-1)
        wanted = torch.tensor(answer[1:], device=logp.device)
        told.append(float(logp.gather(-1, wanted[:, None]).sum()))
    return told
