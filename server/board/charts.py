"""Charts as SVG, made on the server. Colours come from classes of the style sheet, so that they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 28
MOST_DOTS = 60  # points that are drawn as dots of their own


@dataclass(frozen=True)
class Series:
    """One line: its name, and (x, y, what to say of the point)."""

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Turn:
    """A place to point at."""

    x: float
    text: str


def line_chart(
    title: str,
    series: Sequence[Series],
    low: float | None = None,
    high: float | None = None,
    show: Callable[[float], str] = "{:.2f}".format,
    turns: Sequence[Turn] = (),
    steps: bool = False,
) -> Markup:
    """Lines over a common x. Empty when no series has a point. `show` writes a value of the y axis."""
    shown = [each for each in series if each.points]
    if not shown:
        return Markup("")
    xs = [x for each in shown for x, _, _ in each.points]
    ys = [y for each in shown for _, y, _ in each.points]
    scale = _Scale(
        (min(xs), max(xs)), (min(ys) if low is None else low, max(ys) if high is None else max(high, *ys))
    )
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, _in_words(title, shown, show)
        ),
        _grid(scale, show),
    ]
    for turn in turns:
        x = scale.x(turn.x)
        side, anchor = (-6, "end") if x > WIDTH / 2 else (6, "start")
        parts.append(
            Markup(
                '<line class="turn" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                '<text class="turn-text" x="{3:.1f}" y="{4}" text-anchor="{5}">{6}</text>'
            ).format(x, TOP, HEIGHT - BOTTOM, x + side, TOP + 12, anchor, turn.text)
        )
    parts += [_line(scale, i, each, steps) for i, each in enumerate(shown)]
    parts.append(Markup("</svg>"))
    if len(shown) > 1:
        parts.append(_legend(shown))
    return Markup("").join(parts)


class _Scale:
    """From values to places in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.low_x, self.high_x = x
        self.low, self.high = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)

    def x(self, value: float) -> float:
        span = self.high_x - self.low_x
        share = (value - self.low_x) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(scale: _Scale, show: Callable[[float], str]) -> Markup:
    lines = []
    for i in range(5):
        value = scale.low + (scale.high - scale.low) * i / 4
        y = scale.y(value)
        lines.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, LEFT - 6, y + 4, show(value))
        )
    return Markup("").join(lines)


def _line(scale: _Scale, number: int, series: Series, steps: bool) -> Markup:
    places = [(scale.x(x), scale.y(y)) for x, y, _ in series.points]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for x, y in places[1:]:
        path += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
    parts = [Markup('<path class="line s{}" d="{}"/>').format(number + 1, path)]
    every = max(1, math.ceil(len(places) / MOST_DOTS))
    for (x, y), (_, _, text) in list(zip(places, series.points, strict=True))[::every]:
        parts.append(
            Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                number + 1, x, y, text
            )
        )
    return Markup("").join(parts)


def _legend(series: Sequence[Series]) -> Markup:
    entries = [
        Markup(
            '<span class="key"><svg viewBox="0 0 14 14" aria-hidden="true">'
            '<circle class="dot s{}" cx="7" cy="7" r="5"/></svg>{}</span>'
        ).format(i + 1, each.name)
        for i, each in enumerate(series)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(entries))


def _in_words(title: str, series: Sequence[Series], show: Callable[[float], str]) -> str:
    """What a screen reader says in the chart's place."""
    told = [
        f"{each.name} from {show(each.points[0][1])} to {show(each.points[-1][1])}, highest "
        f"{show(max(y for _, y, _ in each.points))}, {len(each.points)} points"
        for each in series
    ]
    return f"{title}: {'; '.join(told)}."


def bar(share: float) -> Markup:
    """A share of 0..1 as a bar; the number stands beside it."""
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="bar-ground" width="100" height="8"/><rect class="bar-fill {}" width="{:.1f}" height="8"/></svg>'
    ).format("good" if share >= 0.75 else "fair" if share >= 0.5 else "bad", 100 * min(1.0, max(0.0, share)))


def heat_map(title: str, grid: Sequence[Sequence[float]], tokens: Sequence[str]) -> Markup:
    """Tokens down, layers across; the darker, the greater the effect. `grid`: (tokens, layers)."""
    rows, columns = len(grid), max((len(row) for row in grid), default=0)
    if not rows or not columns:
        return Markup("")
    greatest = max((abs(v) for row in grid for v in row), default=0.0) or 1.0
    left, side_x, side_y = 120, max(8.0, min(22.0, 500 / columns)), 18
    width, height = left + columns * side_x + 8, rows * side_y + 30
    parts = [
        Markup('<svg class="heat" viewBox="0 0 {:.0f} {}" role="img" aria-label="{}">').format(
            width, height, f"{title}: {rows} tokens by {columns} layers; greatest effect {greatest:.3g}."
        )
    ]
    for r, row in enumerate(grid):
        label = tokens[r] if r < len(tokens) else ""
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                left - 6, r * side_y + 13, label[:16]
            )
        )
        parts += [
            Markup(
                '<rect class="cell{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.3f}">'
                "<title>{}</title></rect>"
            ).format(
                " below" if value < 0 else "",
                left + c * side_x,
                r * side_y,
                side_x - 1,
                side_y - 1,
                abs(value) / greatest,
                f"{label!r}, layer {c}: {value:.4g}",
            )
            for c, value in enumerate(row)
        ]
    every = max(1, columns // 10)
    parts += [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            left + (c + 0.5) * side_x, rows * side_y + 14, c
        )
        for c in range(0, columns, every)
    ]
    parts.append(
        Markup('<text class="tick" x="{}" y="{}">{}</text></svg>').format(left, height - 2, escape("layer"))
    )
    return Markup("").join(parts)
