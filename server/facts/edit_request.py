"""What one call of preview or apply asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from editors.edit import Edit
from server.facts.guard import Goal, Guard
from store import Approval

AUTO = "auto"


@dataclass(frozen=True)
class EditRequest:
    """What one call of apply or preview asks for."""

    edits: Sequence[Edit]
    method: str = AUTO
    params: dict[str, Any] | None = None
    guard: Guard | None = None
    replace: bool = False
    reason: str | None = None
    source: str | None = None
    explain: bool = False  # also report the known facts that lie near
    goal: Goal = "everywhere"
    partial: bool = False  # keep the edits that hold, and name those that do not
    approval: Approval | None = None  # the proposal that this carries out
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the ledger keeps of an edit beside its request, by its prompt."""
    judged: int | None = (
        None  # how many edits, the first ones, are judged by more than their own prompts; None: all
    )
