"""Charts as SVG, made on the server. Colours come from classes of the style sheet, so that they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 12, 30
MOST_DOTS = 60  # points that are drawn as dots of their own
MOST_TICKS = 5
Show = Callable[[float, int], str]
"""Writes a value of the y axis with so many decimals."""


def plain(value: float, decimals: int) -> str:
    """A number."""
    return f"{value:.{decimals}f}"


def times(value: float, decimals: int) -> str:
    """A multiple."""
    return f"×{value:.{decimals}f}"


def percent(value: float, _: int) -> str:
    """A share of 0..1."""
    return f"{value:.0%}"


@dataclass(frozen=True)
class Series:
    """One line: its name, and its points as (x, y, tooltip)."""

    name: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Mark:
    """A labelled place on the x axis."""

    x: float
    text: str
    kind: str = "turn"


def line_chart(
    title: str,
    series: Sequence[Series],
    low: float | None = None,
    high: float | None = None,
    show: Show = plain,
    turns: Sequence[Mark] = (),
    steps: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over a common x. Empty when no series has a point.

    Args:
        low, high: ends of the y axis; left out, from the values.
        turns: places on the x axis to point at.
        steps: the values hold until the next point.
        marks: labels below the x axis, each at its x.
    """
    shown = [each for each in series if each.points]
    if not shown:
        return Markup("")
    xs = [x for each in shown for x, _, _ in each.points] + [turn.x for turn in turns]
    ys = [y for each in shown for _, y, _ in each.points]
    scale = _Scale(
        (min(xs), max(xs)), (min(ys) if low is None else low, max(ys) if high is None else max(high, *ys))
    )
    words = _in_words(title, shown, show, scale.decimals + 1)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, words
        ),
        _grid(scale, show),
        *(_mark(scale, x, text) for x, text in marks),
        *(_turn(scale, turn) for turn in turns),
        *(_line(scale, i, each, steps) for i, each in enumerate(shown)),
        Markup("</svg>"),
    ]
    if len(shown) > 1:
        parts.append(_legend(shown))
    return Markup("").join(parts)


def ends(times_at: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The first and the last of some (x, time) as marks: their days, or their hours where it was one day."""
    shown = [times_at[0], times_at[-1]] if len(times_at) > 1 else list(times_at)
    part = slice(11, 16) if len(shown) > 1 and shown[0][1][:10] == shown[1][1][:10] else slice(10)
    return [(x, at[part]) for x, at in shown]


class _Scale:
    """From values to places in the picture; the y axis begins and ends at round numbers."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.low_x, self.high_x = x
        low, high = y if y[1] - y[0] > 1e-9 * max(1.0, abs(y[1])) else (y[0], y[0] + (abs(y[0]) or 1.0) / 100)
        self.step = _round_step((high - low) / (MOST_TICKS - 1))
        self.low = math.floor(low / self.step + 1e-6) * self.step
        self.high = math.ceil(high / self.step - 1e-6) * self.step
        self.decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))

    @property
    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]

    def x(self, value: float) -> float:
        span = self.high_x - self.low_x
        share = (value - self.low_x) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _grid(scale: _Scale, show: Show) -> Markup:
    lines = []
    for value in scale.ticks:
        y = scale.y(value)
        lines.append(
            Markup(
                '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text class="tick" x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, LEFT - 6, y + 4, show(value, scale.decimals))
        )
    return Markup("").join(lines)


def _mark(scale: _Scale, x: float, text: str) -> Markup:
    at = scale.x(x)
    anchor = "start" if at < LEFT + 20 else "end" if at > WIDTH - RIGHT - 20 else "middle"
    return Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
        at, HEIGHT - 8, anchor, text
    )


def _turn(scale: _Scale, turn: Mark) -> Markup:
    x = scale.x(turn.x)
    side, anchor = (-6, "end") if x > WIDTH / 2 else (6, "start")
    return Markup(
        '<line class="{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2}" y2="{3}"/>'
        '<text class="{0}-text" x="{4:.1f}" y="{5}" text-anchor="{6}">{7}</text>'
    ).format(turn.kind, x, TOP, HEIGHT - BOTTOM, x + side, TOP + 12, anchor, turn.text)


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


def _in_words(title: str, series: Sequence[Series], show: Show, decimals: int) -> str:
    """The chart in words, for screen readers."""
    told = [
        f"{each.name} from {show(each.points[0][1], decimals)} to {show(each.points[-1][1], decimals)}, highest "
        f"{show(max(y for _, y, _ in each.points), decimals)}, {len(each.points)} points"
        for each in series
    ]
    return f"{title}: {'; '.join(told)}."


def bar(share: float) -> Markup:
    """A share of 0..1 as a bar; the number stands beside it."""
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="bar-ground" width="100" height="8"/><rect class="bar-fill {}" width="{:.1f}" height="8"/></svg>'
    ).format("good" if share >= 0.75 else "fair" if share >= 0.5 else "bad", 100 * min(1.0, max(0.0, share)))


def stack(shares: Sequence[tuple[str, int, str]]) -> Markup:
    """Counts of one whole as a bar of parts, by (name, count, colour); the numbers stand beside it."""
    whole, at, parts = sum(count for _, count, _ in shares) or 1, 0.0, []
    for _, count, colour in shares:
        wide = 100 * count / whole
        parts.append(
            Markup('<rect class="bar-fill {}" x="{:.2f}" width="{:.2f}" height="8"/>').format(
                colour, at, wide
            )
        )
        at += wide
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(parts))


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
        for c, value in enumerate(row):
            about = f"{label!r}, layer {c}: {value:.4g}"
            parts.append(
                _cell(left + c * side_x, r * side_y, (side_x - 1, side_y - 1), value / greatest, about)
            )
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


def _cell(x: float, y: int, size: tuple[float, int], share: float, about: str) -> Markup:
    """One cell of a heat map; `share` of the greatest effect, -1..1, is its colour and opacity."""
    return Markup(
        '<rect class="cell{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.3f}">'
        "<title>{}</title></rect>"
    ).format(" below" if share < 0 else "", x, y, *size, abs(share), about)
