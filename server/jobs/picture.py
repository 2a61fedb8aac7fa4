"""The curves of a training job as one picture."""

from __future__ import annotations

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
    """Losses on the left, rates on validation facts on the right, by step; a PNG."""
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
