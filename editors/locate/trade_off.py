"""The trade-off between layers as PNG: rates over candidate layers, traced effects behind them; 800 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from editors.pictures import FAINT, INK, MARK, WIDTH, drawing, new_figure, png, readable, tidy


@dataclass(frozen=True)
class Curve:
    """One measured rate over the candidate layers."""

    name: str
    values: Sequence[float | None]
    colour: str
    marker: str


def trade_off(
    labels: Sequence[str], curves: Sequence[Curve], traced: Sequence[float] | None, best: int, title: str
) -> bytes:
    """Rates over candidate layers, the best marked; with traced effects as bars behind them."""
    with drawing([title]):
        figure = new_figure(WIDTH, 4.1)
        figure.text(0.02, 0.965, readable(title, 90), va="top", size=11, weight="bold", color=INK)
        axes = figure.add_axes((0.08, 0.18, 0.84, 0.62))
        axes.annotate("best", (best, 1.05), ha="center", color=MARK, weight="bold", size=9)
        handles: list[Any] = []
        ground = axes
        if traced is not None and max(traced) > 0:
            ground, bars = _bars_behind(axes, traced)
            handles.append(bars)
        ground.axvspan(best - 0.4, best + 0.4, color="#fff1d6", zorder=0)
        for shift, curve in enumerate(curves, -1):
            handles += _line(axes, curve, 0.06 * shift)
        _finish(axes, labels)
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.07, 0.9),
            ncols=4,
            frameon=False,
            fontsize=8.5,
        )
        return png(figure)


def _bars_behind(axes: Any, traced: Sequence[float]) -> tuple[Any, Any]:
    """Axes behind the others with the traced effects, and their bars."""
    behind = axes.twinx()
    bars = behind.bar(
        np.arange(len(traced)), traced, 0.5, color="#d7dbe0", zorder=1, label="traced effect (right)"
    )
    behind.set_ylim(0, max(traced) * 1.6)
    behind.tick_params(length=2, labelsize=8, colors=FAINT)
    for side in ("top", "right"):
        behind.spines[side].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    return behind, bars


def _line(axes: Any, curve: Curve, shift: float) -> list[Any]:
    """One rate over the layers, moved aside a little so that equal rates are seen."""
    points = [(i + shift, value) for i, value in enumerate(curve.values) if value is not None]
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    lines: list[Any] = axes.plot(
        xs, ys, color=curve.colour, marker=curve.marker, linewidth=1.8, label=curve.name, zorder=3
    )
    return lines


def _finish(axes: Any, labels: Sequence[str]) -> None:
    axes.set_ylim(-0.03, 1.13)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_xlabel("edited layer")
    axes.set_ylabel("share of probes")
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    tidy(axes)
