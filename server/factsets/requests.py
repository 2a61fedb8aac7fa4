"""What the tools of fact sets ask for. Imports nothing heavy, so that the tools can use it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Template = str | Mapping[str, str] | None
"""One prompt with {} for the subject, or one for each relation."""

Kind = Literal[
    "agrees", "differs", "unsure", "unchecked", "changed", "planned", "done", "failed", "right", "skipped", "lost",
    "conflict",
]  # fmt: skip
"""What a page of a set can be limited to: a verdict, or an outcome of the last correction."""
OUTCOMES = ("planned", "done", "failed", "right", "skipped", "lost")


@dataclass(frozen=True)
class Given:
    """What a call of save_facts gives."""

    path: str | None = None
    facts: Sequence[Mapping[str, Any]] | None = None
    template: Template = None
    columns: Mapping[str, str] | None = None
    partial: bool = False
    keep: bool = False
    reason: str | None = None
