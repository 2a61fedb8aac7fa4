"""Icons for hosts that show some: of the server, and one for each toolset."""

from __future__ import annotations

from urllib.parse import quote

from mcp_types import Icon

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">'
    '<rect width="48" height="48" rx="10" fill="#1f3a5f"/>'
    '<g fill="none" stroke-width="4" stroke-linecap="round" stroke-linejoin="round">'
    '<path d="M11 31h26M11 39h18" stroke="#fff"/>'
    '<path d="M11 21h14" stroke="#8f9daf" stroke-width="7"/>'
    '<path d="M8 21h20" stroke="#ff7a59" stroke-width="2"/>'
    '<path d="M32 23l4-5 4 5" stroke="#7fd18b" stroke-width="3"/>'
    '<path d="M29 10h11" stroke="#7fd18b"/>'
    "</g>"
    "</svg>"
)
"""packaging/icon.svg: a page with a struck word, a caret, and the right word above it."""
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAADAAAAAwBAMAAAClLOS0AAAAMFBMVEUeOV7w8vSWnq0xUWlXbIcEBASD2I1vlI98zIn7dlHhgm8e"
    "OV8fOV9FYXRYlHkpMmQUaV0OAAAAEHRSTlP+/////wD//////0uU//8Hw3QUVwAAAXJJREFUeNq1lL9LAlEcwD/3TvthdtkSLYLg"
    "1hDX4GZB0BzX0NIPbG5yaW2uJYT+gfbCJGiJBimCUqwDszEstwgUI0RLa/BOfee51Xd5730/975fPu/unrKKb3MJObIzWwhYceaJ"
    "TAHGBi5x41U+7+ddQDTMOq5xTsUdTIi0O/gWAWmtAqCDoh5J+Z1jTzR6Ii5oKNKG4Vh7zJh4JDAnQgCtDA5QmH0GGDGd4CMHQJN/"
    "DrUIWM3VxTIAk+8m5A+64MFoP1wWoJ5NmzogANWwy7RMIsXXQ3tHc6/T4JqFqlbVLcHRcgf4tOrX1bJt3tjvgORtai2sD1k9miE7"
    "79UDL6HmLoACML5tgbu0VgiiFYL/cT79i3Zz+XXFEjZQ5G/IX7I80OXCtU7BslcCWsUuxWO8F1z+iUdXyOkRS/SCHg9/yZo4PWr2"
    "RKSBpx5re/RUgHou7nT4GfhzqqW8K0gOvgAGXRnCW0/158cShoDTvtPMvsEvQzJbxk1P2PIAAAAASUVORK5CYII="
)
"""packaging/icon-48.png in base64, for hosts that show no SVG. Made by packaging/draw_icon.py."""

SHAPES = {
    "inspect": "M10 10m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0M15 15l6 6",
    "facts": "M4 6l2 2 3-4M4 16l2 2 3-4M13 6h8M13 16h8",
    "locate": "M12 21c-5-6-7-8-7-12a7 7 0 0 1 14 0c0 4-2 6-7 12zM10 9h4",
    "edit": "M4 20l1-5L16 4l4 4L9 19z",
    "steer": "M12 3v18M4 7h10M10 17h10",
    "ledger": "M5 3h14v18H5zM9 8h6M9 12h6M9 16h4",
    "people": "M8 11a4 4 0 1 0 0-8a4 4 0 0 0 0 8zM2 21a6 6 0 0 1 12 0M15 12l3 3 5-6",
    "train": "M3 20h18M6 16l4-5 4 3 5-8",
}
"""The lines of each toolset's icon, on a field of 24 x 24."""


def server_icons() -> list[Icon]:
    """The icon of the server, as SVG and as PNG."""
    return [_svg(SVG), Icon(src=f"data:image/png;base64,{PNG}", mime_type="image/png", sizes=["48x48"])]


def toolset_icons(toolset: str) -> list[Icon]:
    """The icon of a toolset's tools. Its grey can be seen on light and on dark ground."""
    lines = f'<path fill="none" stroke="#6b7f99" stroke-width="2" d="{SHAPES[toolset]}"/>'
    return [_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{lines}</svg>')]


def _svg(text: str) -> Icon:
    # As few characters as can be: a host gets these with every list of tools.
    address = "data:image/svg+xml," + quote(text, safe="/:=;()")
    return Icon(src=address, mime_type="image/svg+xml", sizes=["any"])
