"""Draws packaging/icon.png from the same shapes as icon.svg: `python packaging/draw_icon.py`.

A page with a struck word, a caret, and the right word above it: an erratum.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

LINES = [
    ([(11, 31), (37, 31)], 4, "#ffffff"),
    ([(11, 39), (29, 39)], 4, "#ffffff"),
    ([(11, 21), (25, 21)], 7, "#8f9daf"),
    ([(8, 21), (28, 21)], 2, "#ff7a59"),
    ([(32, 23), (36, 18), (40, 23)], 3, "#7fd18b"),
    ([(29, 10), (40, 10)], 4, "#7fd18b"),
]
"""Points on a field of 48 x 48, width, colour."""


def draw(size: int) -> Image.Image:
    """The icon with this many pixels on each side."""
    scale = size * 4 / 48  # drawn larger, then smoothed
    picture = Image.new("RGBA", (size * 4, size * 4), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    pen.rounded_rectangle((0, 0, size * 4 - 1, size * 4 - 1), 10 * scale, fill="#1f3a5f")
    for points, width, colour in LINES:
        scaled = [(x * scale, y * scale) for x, y in points]
        pen.line(scaled, fill=colour, width=round(width * scale), joint="curve")
        for x, y in scaled:
            r = width * scale / 2
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    folder = Path(__file__).parent
    draw(512).quantize(32).save(folder / "icon.png", optimize=True)
    draw(48).quantize(16).save(folder / "icon-48.png", optimize=True)
