"""What all pictures share: figures that are safe in threads, PNG bytes, and text that can be drawn.

matplotlib is imported at the first picture. The background is white and opaque, so that a picture reads the same in
a dark window.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

DPI = 100
WIDTH = 8.0
"""Inches: 800 pixels."""
LONGEST_LABEL = 16
INK, FAINT, MARK = "#1b1f24", "#6a737d", "#b3470b"
BLUE, ORANGE, GREY = "#2f6db5", "#d9822b", "#8a8a8a"
_lock = threading.Lock()  # matplotlib's settings and font cache are shared by all threads


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A figure of its own, in inches. pyplot is not used: it keeps global state and is not safe in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def drawing(texts: Sequence[str] = (), **settings: Any) -> Iterator[None]:
    """Draw alone, with fonts that have the characters of these texts."""
    import matplotlib as mpl

    with _lock:
        wanted: Any = {"text.parse_math": False, "font.size": 9, **settings}
        if texts:
            wanted["font.family"] = font_families(texts)
        with mpl.rc_context(wanted):
            yield


def png(figure: Any) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tidy(axes: Any) -> None:
    """Short ticks, no lines at the top and on the right."""
    axes.tick_params(length=2, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


# --- text ----------------------------------------------------------------------------------------


@cache
def _has(font: str, character: str) -> bool:
    from matplotlib.font_manager import get_font

    return bool(get_font(font).get_char_index(ord(character)))


@cache
def _font_for(character: str) -> str | None:
    """The family of an installed font that has a character; None when there is none."""
    from matplotlib.font_manager import fontManager

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
    """A text that can be drawn: control characters, and those that no font has, as escapes.

    A text longer than `longest` is cut, with `end` at its beginning.
    """
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


def font_families(texts: Sequence[str]) -> list[str]:
    """The fonts these texts need, the usual one first."""
    needed = {font for text in texts for c in text if not c.isspace() and (font := _font_for(c))}
    return ["DejaVu Sans", *sorted(needed - {"DejaVu Sans"})]
