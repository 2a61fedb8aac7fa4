"""The curves of a training job as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editors.pictures import new_figure, png
from server.jobs.results import JobInfo

_LOSSES = {
    "train_loss": "#8a8a8a",
    "l_edit": "#2f6db5",
    "l_loc": "#d9822b",
    "l_base": "#7a5195",
    "loss": "#2f6db5",
}
_RATES = {
    "reliability": "#2f6db5",
    "generality": "#3a923a",
    "locality": "#d9822b",
    "scope_accuracy": "#7a5195",
}


def curves(job: JobInfo) -> bytes:
    """Losses on the left, rates on validation facts on the right, by step; a PNG. A calibration has its own picture."""
    if job.result is not None and "methods" in job.result:
        return front(job.result["methods"])
    figure = new_figure(9.0, 3.8, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, _LOSSES), (right, _RATES)):
        for name, colour in names.items():
            points = [(m["step"], m[name]) for m in job.metrics if name in m and "step" in m]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=name)
        axes.set_xlabel("step")
        if axes.get_lines():
            axes.legend(fontsize=8)
    left.set_title(f"{job.job_id}: losses")
    right.set_title("on validation facts")
    right.set_ylim(-0.02, 1.02)
    return png(figure)


def front(methods: Mapping[str, Any]) -> bytes:
    """Success against damage of everything that a calibration tried, the chosen ones marked; a PNG."""
    figure = new_figure(7.0, 4.2, layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(methods.items(), _RATES.values(), strict=False):
        points = [(point["perplexity_ratio"], point["score"], point["params"]) for point in found["tried"]]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color=colour, label=name)
        chosen = [(x, y) for x, y, params in points if params == found["params"]]
        axes.plot(*zip(*chosen, strict=True), "o", markersize=13, fillstyle="none", color=colour)
    axes.set_xlabel("perplexity of ordinary text, after / before")
    axes.set_ylabel("score on the facts that choose")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=8)
    axes.set_title("what was tried; the ring is what was chosen")
    return png(figure)
