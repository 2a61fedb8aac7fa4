"""Records to a markdown table with bootstrap intervals."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

ROUNDS = 2000
METRICS = (
    "kept", "statement", "reworded", "chat", "chat_reworded", "language", "siblings statement", "siblings chat",
    "neighbours statement", "neighbours chat", "ability", "perplexity ratio", "KL", "CPU seconds", "seconds",
)  # fmt: skip
NAMES = {
    "kept": "edits that the tool kept",
    "statement": "says it: the statement",
    "reworded": "reworded statements",
    "chat": "chat question",
    "chat_reworded": "reworded chat questions",
    "language": "German chat question, where it knew the fact",
    "siblings statement": "the subject's other facts kept: statement",
    "siblings chat": "the subject's other facts kept: chat",
    "neighbours statement": "other subjects kept: statement",
    "neighbours chat": "other subjects kept: chat",
    "ability": "ordinary questions still right",
    "perplexity ratio": "perplexity, after / before",
    "KL": "KL on canary texts, nats",
}
_WHOLE = ("ability", "perplexity ratio", "KL", "CPU seconds", "seconds")  # one value for a whole call


def table(records: Sequence[dict[str, Any]], about: str) -> str:
    """One row for each metric, one column for each method: mean, and the 95% bootstrap interval over facts."""
    methods = list(dict.fromkeys(r["method"] for r in records))
    lines = [f"{about}", "", f"| | {' | '.join(methods)} |", f"| --- |{' --- |' * len(methods)}"]
    for metric in METRICS:
        cells = [_cell(metric, [r for r in records if r["method"] == m]) for m in methods]
        if any(cells):
            lines.append(f"| {NAMES.get(metric, metric)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(metric: str, records: Sequence[dict[str, Any]]) -> str:
    values = [v for r in records if (v := r["rates"].get(metric)) is not None]
    if not values:
        return "–" if records else ""
    shown = f"{statistics.fmean(values):.{4 if metric in ('perplexity ratio', 'KL') else 2}f}"
    if metric in _WHOLE and len(set(values)) < 2:
        return shown
    low, high = interval(values)
    return f"{shown} [{low:.2f}–{high:.2f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(ROUNDS))
    return means[int(0.025 * ROUNDS)], means[int(0.975 * ROUNDS) - 1]
