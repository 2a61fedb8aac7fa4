"""Editing methods, and what it takes to use them from Python (see editors/library.py).

Everything is imported at its first use, so that code which only describes an edit does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.edit import Edit as Edit
    from editors.library import applied as applied
    from editors.library import compute_patch as compute_patch
    from editors.model.lm import LM as LM
    from editors.table import METHODS as METHODS

_PLACES = {
    "Edit": "editors.edit",
    "LM": "editors.model.lm",
    "METHODS": "editors.table",
    "applied": "editors.library",
    "compute_patch": "editors.library",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
