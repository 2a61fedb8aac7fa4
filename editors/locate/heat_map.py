"""Heat maps of a located fact as PNG, 800 pixels wide: a row per token, a column per layer, the subject marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from editors.locate.result import Located
from editors.pictures import FAINT, INK, MARK, WIDTH, drawing, new_figure, png, readable, tidy

ROW = 0.225  # height of a token's row, inches
MOST_ROWS = 28

TITLES = {
    "state": "State restored",
    "mlp": "MLP restored",
    "attention": "Attention restored",
    "neurons": "Knowledge neurons",
    "lens": "Logit lens",
}
COLOURS = {"state": "Purples", "mlp": "Greens", "attention": "Reds", "neurons": "Greens", "lens": "Blues"}


@dataclass(frozen=True)
class _DrawnRows:
    """The tokens that are drawn; None is a row that stands for the tokens left out."""

    tokens: list[int | None]
    labels: list[str]
    marked: list[int]  # the subject's rows


def rows_of(located: Located) -> _DrawnRows:
    """The rows to draw. Of a long prompt, what stands before the subject and the middle are left out."""
    traced = located.traced
    total = len(traced.labels)
    subject = set() if traced.decoder_ids else set(traced.subject)
    first = (
        0
        if not subject
        else max(traced.shown, traced.subject.start - 3)
        if total > MOST_ROWS
        else traced.shown
    )
    tokens: list[int | None] = list(range(min(first, min(subject, default=0)), total))
    if len(tokens) > MOST_ROWS:
        at_end = 8
        at_start = MOST_ROWS - at_end - 1
        tokens = [*tokens[:at_start], None, *tokens[-at_end:]]
    labels = []
    for t in tokens:
        if t is None:
            labels.append(f"⋯ {total - MOST_ROWS + 1 - first} more")
        else:
            labels.append(readable(traced.labels[t]) + (" *" if t in subject else ""))
    return _DrawnRows(tokens, labels, [i for i, t in enumerate(tokens) if t in subject])


def heat_map(located: Located) -> bytes:
    """All maps of a result, one below the other, as a PNG 800 pixels wide."""
    rows = rows_of(located)
    title = readable(located.traced.text, 84, end=True)
    answer = readable(located.traced.answer, 40)
    bars = any(name in located.numbers for name in ("attention_logits", "mlp_logits"))
    with drawing([title, answer, *rows.labels], **{"axes.edgecolor": FAINT, "text.color": INK}):
        return _draw_maps(located, rows, title, answer, bars)


def _draw_maps(located: Located, rows: _DrawnRows, title: str, answer: str, bars: bool) -> bytes:
    panel = max(len(rows.tokens), 3) * ROW
    heights = [panel] * len(located.maps) + ([1.5] if bars else [])
    gap, top, bottom = 0.62, 1.0, 0.55
    total = top + bottom + sum(heights) + gap * (len(heights) - 1)
    figure = new_figure(WIDTH, total)
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
    return png(figure)


def _headline(located: Located) -> str:
    n = located.numbers
    if "total_effect" in n:
        return (
            f"p = {n['p_clean']:.2f}, with noise on the subject {n['p_corrupted']:.2f}; "
            f"{n['samples']} noise sample{'s' if n['samples'] > 1 else ''}; * subject"
        )
    if "factor" in n:
        return f"p = {n['clean']:.2f}, neurons at zero {n['suppressed']:.2f}, doubled {n['amplified']:.2f}; * subject"
    return f"{located.unit}; * subject"


def _draw_map(
    figure: Any, place: tuple[float, ...], located: Located, rows: _DrawnRows, name: str, grid: Any
) -> None:
    layers = grid.shape[1]
    values = np.full((len(rows.tokens), layers), np.nan)
    for i, token in enumerate(rows.tokens):
        if token is not None:
            values[i] = grid[token]
    high = float(np.nanmax(values))
    axes = figure.add_axes(place)
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=COLOURS.get(name, "Greens"),
        vmin=0,
        vmax=max(high, 1e-9),
        interpolation="nearest",
    )
    window = located.numbers.get("window", 1)
    wide = f", {window} layers at once" if name in ("mlp", "attention") and window > 1 else ""
    row, best = divmod(int(np.nanargmax(values)), layers)
    where = rows.labels[row].removesuffix(" *")
    best_text = (
        f"best: layer {best} at “{where}” ({high:.2g})" if high > 0 else "nothing here raises the answer"
    )
    axes.set_title(f"{TITLES.get(name, name)}{wide}   {best_text}", loc="left", size=9.5, weight="bold")
    if high > 0:
        box: dict[str, Any] = {"fill": False, "edgecolor": MARK, "linewidth": 1.6}
        axes.add_patch(mpl.patches.Rectangle((best - 0.5, row - 0.5), 1, 1, **box))
    axes.set_yticks(range(len(rows.labels)), rows.labels)
    for i in rows.marked:
        tick = axes.get_yticklabels()[i]
        tick.set_color(MARK)
        tick.set_fontweight("bold")
    _layer_axis(axes, layers)
    tidy(axes)
    _draw_scale(figure, place, image)


def _draw_scale(figure: Any, place: tuple[float, ...], image: Any) -> None:
    """The colour scale to the right of a map."""
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


def _draw_bars(figure: Any, place: tuple[float, ...], located: Located) -> None:
    attention = np.array(located.numbers["attention_logits"])
    mlp = np.array(located.numbers["mlp_logits"])
    axes = figure.add_axes(place)
    x = np.arange(len(mlp))
    axes.bar(x - 0.2, attention, 0.4, color="#c2402a", label="attention")
    axes.bar(x + 0.2, mlp, 0.4, color="#2a7f3f", label="MLP")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xlim(-0.5, len(mlp) - 0.5)
    axes.set_title("What raises the answer's logit at the last token", loc="left", size=9.5, weight="bold")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    _layer_axis(axes, len(mlp))
    tidy(axes)
