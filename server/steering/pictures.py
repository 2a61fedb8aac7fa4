"""Pictures of steering: the sweep over layers, the curve of doses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors.pictures import BLUE, GREY, ORANGE, new_figure, png
from server.steering.results import Calibration, Evaluation, LayerSeparation


def _axes() -> tuple[Any, Any]:
    figure = new_figure(7.2, 4.0, layout="constrained")
    return figure, figure.subplots()


def sweep_picture(name: str, sweep: Sequence[LayerSeparation], layers: Sequence[int]) -> bytes:
    """Separation on held-out pairs (or the shift, for a single pair) by layer, chosen layers marked."""
    figure, axes = _axes()
    told = all(row.d_prime is not None for row in sweep)
    heights = [row.d_prime if told and row.d_prime is not None else row.shift for row in sweep]
    colours = [ORANGE if row.layer in layers else BLUE for row in sweep]
    axes.bar([row.layer for row in sweep], heights, color=colours)
    axes.set_xlabel("layer")
    axes.set_ylabel("separation of held-out pairs (d')" if told else "shift (hidden norms)")
    axes.set_title(f"{name}: where the two sides differ (chosen layers in orange)")
    return png(figure)


def evaluation_picture(result: Evaluation) -> bytes:
    """Score against multiplier, perplexity ratios on the right."""
    figure, axes = _axes()
    doses = [row.multiplier for row in result.table]
    axes.plot(doses, [row.score for row in result.table], "o-", color=BLUE)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("multiplier (mean hidden norms)")
    axes.set_ylabel(f"mean {result.score}", color=BLUE)
    right = axes.twinx()
    right.plot(doses, [row.text_ratio for row in result.table], "s--", color=ORANGE, label="fixed texts")
    if all(row.perplexity_ratio is not None for row in result.table):
        right.plot(
            doses,
            [row.perplexity_ratio for row in result.table],
            "^:",
            color=ORANGE,
            label="generated texts",
        )
    right.set_ylabel("perplexity ratio", color=ORANGE)
    right.set_yscale("log")
    right.legend(loc="upper center", fontsize=8)
    axes.set_title(f"{result.name}: effect by dose, {result.prompts} prompts")
    return png(figure)


def calibration_picture(result: Calibration) -> bytes:
    """Perplexity ratio against multiplier, with the bound."""
    figure, axes = _axes()
    axes.plot(
        [p.multiplier for p in result.curve], [p.perplexity_ratio for p in result.curve], "o-", color=BLUE
    )
    axes.axhline(result.max_perplexity_ratio, color=ORANGE, linestyle="--", label="bound")
    axes.set_yscale("log")
    axes.set_xlabel("multiplier (mean hidden norms)")
    axes.set_ylabel("perplexity ratio")
    axes.legend(fontsize=8)
    axes.set_title(f"{result.name}: how strong a dose stays sound")
    return png(figure)
