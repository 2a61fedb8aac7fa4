"""How a long computation reports its progress."""

from __future__ import annotations

from collections.abc import Callable

ReportProgress = Callable[[float, str], None]
"""Called with the fraction done (0..1) and a message. It may raise, which cancels the computation."""
