"""Editing methods; the table of them is `METHODS` (editors/table.py).

It is looked up at first use, because it imports torch: what only describes an edit must not wait for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.table import METHODS as METHODS


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        from editors.table import METHODS

        return METHODS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
