"""Heat maps as PNG: tokens down, layers across, the subject marked; read at 800 pixels' width.

The background is white and opaque, so that a picture reads the same in a dark window.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib as mpl
import matplotlib.patches
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font

from editors.locate.result import Located

DPI = 100
WIDTH = 8.0  # inches: 800 pixels
ROW = 0.225  # inches a token's row is high
MOST_ROWS = 28
LONGEST_LABEL = 16
INK, FAINT, MARK = "#1b1f24", "#6a737d", "#b3470b"

TITLES = {
    "state": "State restored",
    "mlp": "MLP restored",
    "attention": "Attention restored",
    "neurons": "Knowledge neurons",
    "lens": "Logit lens",
}
COLOURS = {"state": "Purples", "mlp": "Greens", "attention": "Reds", "neurons": "Greens", "lens": "Blues"}
_drawing = threading.Lock()  # matplotlib's settings and font cache are shared by all threads


# --- text ----------------------------------------------------------------------------------------


@cache
def _has(font: str, character: str) -> bool:
    return bool(get_font(font).get_char_index(ord(character)))


@cache
def _font_for(character: str) -> str | None:
    """The family of an installed font that has a character; None when there is none."""
    entries = sorted(
        fontManager.ttflist, key=lambda e: (e.name != "DejaVu Sans", "Noto" not in e.name, e.name, e.weight)
    )
    for entry in entries:
        if entry.name.startswith(("Last Resort", "STIX", "cm")) or entry.style != "normal":  # symbols only
            continue
        try:
            if _has(entry.fname, character):
                return str(entry.name)
        except (OSError, RuntimeError):
            continue
    return None


def readable(label: str, longest: int = LONGEST_LABEL, *, end: bool = False) -> str:
    """A text as it can be drawn: control characters and what no font has as escapes; long ones cut,
    with `end` in front."""
    text = label.strip(" ") or "(space)"
    out = []
    for c in text:
        if c.isprintable() and (c == " " or _font_for(c)):
            out.append(c)
        else:
            out.append({"\n": "\\n", "\t": "\\t"}.get(c) or (f"\\u{ord(c):04x}"))
    text = "".join(out)
    if len(text) <= longest:
        return text
    return "…" + text[1 - longest :] if end else text[: longest - 1] + "…"


def families(texts: Sequence[str]) -> list[str]:
    """The fonts these texts need, the usual one first."""
    needed = {font for text in texts for c in text if not c.isspace() and (font := _font_for(c))}
    return ["DejaVu Sans", *sorted(needed - {"DejaVu Sans"})]


# --- maps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The tokens that are drawn; None stands for tokens left out."""

    tokens: list[int | None]
    labels: list[str]
    marked: list[int]  # rows of the subject


def rows_of(located: Located) -> _Rows:
    """Rows from shortly before the subject on; the middle of a long prompt is left out."""
    scene = located.scene
    total = len(scene.labels)
    subject = set() if scene.decoder_ids else set(scene.subject)
    first = (
        0 if not subject else max(scene.shown, scene.subject.start - 3) if total > MOST_ROWS else scene.shown
    )
    tokens: list[int | None] = list(range(min(first, min(subject, default=0)), total))
    if len(tokens) > MOST_ROWS:
        tail = 8
        head = MOST_ROWS - tail - 1
        tokens = [*tokens[:head], None, *tokens[-tail:]]
    labels = []
    for t in tokens:
        if t is None:
            labels.append(f"⋯ {total - MOST_ROWS + 1 - first} more")
        else:
            labels.append(readable(scene.labels[t]) + (" *" if t in subject else ""))
    return _Rows(tokens, labels, [i for i, t in enumerate(tokens) if t in subject])


def heat_map(located: Located) -> bytes:
    """The maps of one answer below each other, as a PNG 800 pixels wide."""
    with _drawing:
        rows = rows_of(located)
        title = readable(located.scene.text, 84, end=True)
        answer = readable(located.scene.answer, 40)
        bars = [n for n in ("attention_logits", "mlp_logits") if n in located.numbers]
        settings: dict[Any, Any] = {
            "font.family": families([title, answer, *rows.labels]),
            "text.parse_math": False,
        }
        with mpl.rc_context({**settings, "axes.edgecolor": FAINT, "text.color": INK, "font.size": 9}):
            return _draw_maps(located, rows, title, answer, bool(bars))


def _draw_maps(located: Located, rows: _Rows, title: str, answer: str, bars: bool) -> bytes:
    panel = max(len(rows.tokens), 3) * ROW
    heights = [panel] * len(located.maps) + ([1.5] if bars else [])
    gap, top, bottom = 0.62, 1.0, 0.55
    total = top + bottom + sum(heights) + gap * (len(heights) - 1)
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    figure.text(0.02, 1 - 0.13 / total, title, va="top", size=11, weight="bold")
    figure.text(0.02, 1 - 0.37 / total, f"answer: {answer}    {_headline(located)}", va="top", color=FAINT)
    left = min(0.24, 0.035 + 0.0125 * max(4, *(len(label) for label in rows.labels)))
    at = total - top
    for name, grid in located.maps.items():
        at -= panel
        place = (left, at / total, 0.885 - left, panel / total)
        _draw_map(figure, place, located, rows, name, grid.numpy())
        at -= gap
    if bars:
        at -= heights[-1]
        _draw_bars(figure, (left, at / total, 0.885 - left, heights[-1] / total), located)
    return _png(figure)


def _headline(located: Located) -> str:
    n = located.numbers
    if "total_effect" in n:
        return (
            f"p = {n['p_clean']:.2f}, with noise on the subject {n['p_corrupted']:.2f}; "
            f"{n['samples']} noise sample{'s' if n['samples'] > 1 else ''}; * subject"
        )
    if "factor" in n:
        return f"p = {n['clean']:.2f}, neurons silenced {n['suppressed']:.2f}, doubled {n['amplified']:.2f}; * subject"
    return f"{located.unit}; * subject"


def _draw_map(
    figure: Any, place: tuple[float, ...], located: Located, rows: _Rows, name: str, grid: Any
) -> None:
    layers = grid.shape[1]
    shown = np.full((len(rows.tokens), layers), np.nan)
    for i, token in enumerate(rows.tokens):
        if token is not None:
            shown[i] = grid[token]
    high = float(np.nanmax(shown))
    axes = figure.add_axes(place)
    image = axes.imshow(
        shown,
        aspect="auto",
        cmap=COLOURS.get(name, "Greens"),
        vmin=0,
        vmax=max(high, 1e-9),
        interpolation="nearest",
    )
    window = located.numbers.get("window", 1)
    wide = f", {window} layers at once" if name in ("mlp", "attention") and window > 1 else ""
    row, best = divmod(int(np.nanargmax(shown)), layers)
    where = rows.labels[row].removesuffix(" *")
    told = f"best: layer {best} at “{where}” ({high:.2g})" if high > 0 else "nothing here raises the answer"
    axes.set_title(f"{TITLES.get(name, name)}{wide}   {told}", loc="left", size=9.5, weight="bold")
    if high > 0:
        box: dict[str, Any] = {"fill": False, "edgecolor": MARK, "linewidth": 1.6}
        axes.add_patch(mpl.patches.Rectangle((best - 0.5, row - 0.5), 1, 1, **box))
    axes.set_yticks(range(len(rows.labels)), rows.labels)
    for i in rows.marked:
        tick = axes.get_yticklabels()[i]
        tick.set_color(MARK)
        tick.set_fontweight("bold")
    _layer_axis(axes, layers)
    _tidy(axes)
    bar = figure.colorbar(
        image, cax=figure.add_axes((place[0] + place[2] + 0.012, place[1], 0.014, place[3]))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.locator = mpl.ticker.MaxNLocator(4)
    bar.formatter = mpl.ticker.FuncFormatter(lambda value, _: f"{value:.2g}")
    bar.update_ticks()


def _layer_axis(axes: Any, layers: int) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50) if layers / s <= 32 or s == 50)
    step = max(step, 1 if layers <= 32 else step)
    axes.set_xticks(range(0, layers, step))
    axes.tick_params(axis="x", labelsize=8 if layers <= 24 or step > 1 else 7.5)
    axes.set_xlabel("layer", labelpad=1, size=8.5)


def _tidy(axes: Any) -> None:
    axes.tick_params(length=2, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_bars(figure: Any, place: tuple[float, ...], located: Located) -> None:
    attention = np.array(located.numbers["attention_logits"])
    mlp = np.array(located.numbers["mlp_logits"])
    axes = figure.add_axes(place)
    x = np.arange(len(mlp))
    axes.bar(x - 0.2, attention, 0.4, color="#c2402a", label="attention")
    axes.bar(x + 0.2, mlp, 0.4, color="#2a7f3f", label="MLP")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xlim(-0.5, len(mlp) - 0.5)
    axes.set_title("Who writes the answer's logit, at the last token", loc="left", size=9.5, weight="bold")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    _layer_axis(axes, len(mlp))
    _tidy(axes)


# --- trade-off -----------------------------------------------------------------------------------


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
    """Rates over candidate layers, the best marked; traced effects behind them as bars. PNG, 800 wide."""
    with (
        _drawing,
        mpl.rc_context({"font.family": families([title]), "text.parse_math": False, "font.size": 9}),
    ):
        figure = Figure(figsize=(WIDTH, 4.1), dpi=DPI, facecolor="white")
        figure.text(0.02, 0.965, readable(title, 90), va="top", size=11, weight="bold", color=INK)
        axes = figure.add_axes((0.08, 0.18, 0.84, 0.62))
        x = np.arange(len(labels))
        axes.annotate("best", (best, 1.05), ha="center", color=MARK, weight="bold", size=9)
        handles: list[Any] = []
        behind: Any = None
        if traced is not None and max(traced) > 0:
            behind = axes.twinx()
            handles.append(
                behind.bar(x, traced, 0.5, color="#d7dbe0", zorder=1, label="traced effect (right)")
            )
            behind.set_ylim(0, max(traced) * 1.6)
            behind.tick_params(length=2, labelsize=8, colors=FAINT)
            for side in ("top", "right"):
                behind.spines[side].set_visible(False)
            axes.set_zorder(behind.get_zorder() + 1)
            axes.patch.set_visible(False)
        ground = axes if axes.patch.get_visible() else behind
        ground.axvspan(best - 0.4, best + 0.4, color="#fff1d6", zorder=0)
        for k, curve in enumerate(curves):
            points = [(i + 0.06 * (k - 1), v) for i, v in enumerate(curve.values) if v is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                handles += axes.plot(
                    xs, ys, color=curve.colour, marker=curve.marker, linewidth=1.8, label=curve.name, zorder=3
                )
        axes.set_ylim(-0.03, 1.13)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_xticks(x, labels)
        axes.set_xlabel("edited layer")
        axes.set_ylabel("share of probes")
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        _tidy(axes)
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.07, 0.9),
            ncols=4,
            frameon=False,
            fontsize=8.5,
        )
        return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")  # drawn by Agg; no window system is asked
    return buffer.getvalue()
