"""Pictures of steering: the sweep over layers, the curve of doses."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from server.steering.results import Calibration, Evaluation, LayerSeparation

_BLUE, _ORANGE, _GREY = "#2f6db5", "#d9822b", "#8a8a8a"


def _figure() -> tuple[Any, Any]:
    """A figure of its own: pyplot keeps global state and is not safe in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def sweep_picture(name: str, sweep: Sequence[LayerSeparation], layers: Sequence[int]) -> bytes:
    """Separation on held-out pairs (or the shift, for a single pair) by layer, chosen layers marked."""
    figure, axes = _figure()
    told = all(row.d_prime is not None for row in sweep)
    heights = [row.d_prime if told and row.d_prime is not None else row.shift for row in sweep]
    colours = [_ORANGE if row.layer in layers else _BLUE for row in sweep]
    axes.bar([row.layer for row in sweep], heights, color=colours)
    axes.set_xlabel("layer")
    axes.set_ylabel("separation of held-out pairs (d')" if told else "shift (hidden norms)")
    axes.set_title(f"{name}: where the two sides differ (chosen layers in orange)")
    return _png(figure)


def evaluation_picture(result: Evaluation) -> bytes:
    """Score against multiplier, perplexity ratios on the right."""
    figure, axes = _figure()
    doses = [row.multiplier for row in result.table]
    axes.plot(doses, [row.score for row in result.table], "o-", color=_BLUE)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.set_xlabel("multiplier (mean hidden norms)")
    axes.set_ylabel(f"mean {result.score}", color=_BLUE)
    right = axes.twinx()
    right.plot(doses, [row.text_ratio for row in result.table], "s--", color=_ORANGE, label="fixed texts")
    if all(row.perplexity_ratio is not None for row in result.table):
        right.plot(
            doses,
            [row.perplexity_ratio for row in result.table],
            "^:",
            color=_ORANGE,
            label="generated texts",
        )
    right.set_ylabel("perplexity ratio", color=_ORANGE)
    right.set_yscale("log")
    right.legend(loc="upper center", fontsize=8)
    axes.set_title(f"{result.name}: effect by dose, {result.prompts} prompts")
    return _png(figure)


def calibration_picture(result: Calibration) -> bytes:
    """Perplexity ratio against multiplier, with the bound."""
    figure, axes = _figure()
    axes.plot(
        [p.multiplier for p in result.curve], [p.perplexity_ratio for p in result.curve], "o-", color=_BLUE
    )
    axes.axhline(result.max_perplexity_ratio, color=_ORANGE, linestyle="--", label="bound")
    axes.set_yscale("log")
    axes.set_xlabel("multiplier (mean hidden norms)")
    axes.set_ylabel("perplexity ratio")
    axes.legend(fontsize=8)
    axes.set_title(f"{result.name}: how strong a dose stays sound")
    return _png(figure)
