"""Which texts go through the model together: padding costs arithmetic, another pass costs reading the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editors.constants import DEFAULT_MODEL, limit, tuned

CPU_PASS = tuned(
    20,
    "cost of one more forward pass on a CPU, in tokens of a pass",
    models=DEFAULT_MODEL,
    command="forward passes of n rows of w tokens, one thread: seconds = a + b n w",
    figure="CPU ms: 51 for 1 token, 99 for 16 rows of 1, 223 for 4 of 16, 705 for 16 of 16, 1844 for 16 of 43; so a is "
    "55 and b 2.7",
)
GPU_PASS = limit(
    512,
    "the same on a GPU, in tokens",
    "speed alone: it decides how rows are divided into passes; a pass of a few tokens waits for its "
    "launches, whatever its size",
)


def pass_cost(device: torch.device) -> int:
    """The cost of one more forward pass on a device, in tokens of a pass."""
    return CPU_PASS if device.type == "cpu" else GPU_PASS


def grouped(lengths: Sequence[int], extra: Sequence[int], room: int, cost: int) -> list[list[int]]:
    """Indices of texts in batches, those of similar length together, so that all batches cost least.

    A batch of n texts costs n (longest + most extra) tokens with its padding, and (1 + most extra) passes. No batch
    holds more than `room` tokens, unless a text alone does.

    Args:
        lengths: tokens of each text.
        extra: tokens to generate for each, one pass after another.
        cost: of one more pass, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], extra[i]))
    runs = _alike(order, lengths, extra)
    best = [0.0] + [float("inf")] * len(runs)  # least cost of the first so many runs
    begin = [0] * (len(runs) + 1)
    for end in range(1, len(runs) + 1):
        n = most = 0
        longest = lengths[runs[end - 1][0]]
        for start in range(end - 1, -1, -1):
            n += len(runs[start])
            most = max(most, *(extra[i] for i in runs[start]))
            size = n * (longest + most)
            if size > room and start < end - 1:
                break
            passes = (1 + most) * -(-size // room)
            if (total := best[start] + size + cost * passes) < best[end]:
                best[end], begin[end] = total, start
    batches, end = [], len(runs)
    while end:
        batches.append([i for run in runs[begin[end] : end] for i in run])
        end = begin[end]
    return [part for batch in reversed(batches) for part in _cut(batch, lengths, extra, room)]


def _alike(order: Sequence[int], lengths: Sequence[int], extra: Sequence[int]) -> list[list[int]]:
    """Runs in `order` of texts with the same length and the same number of tokens to generate."""
    runs: list[list[int]] = []
    for i in order:
        if runs and (lengths[runs[-1][0]], extra[runs[-1][0]]) == (lengths[i], extra[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _cut(batch: Sequence[int], lengths: Sequence[int], extra: Sequence[int], room: int) -> list[list[int]]:
    """A batch in parts of at most `room` tokens; only one of equal texts can have more."""
    widest = max(lengths[i] for i in batch) + max(extra[i] for i in batch)
    n = max(1, room // max(1, widest))
    return [list(batch[at : at + n]) for at in range(0, len(batch), n)]
