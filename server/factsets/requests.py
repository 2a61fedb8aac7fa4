"""What the tools of fact sets ask for. Imports nothing heavy, so that the tools can use it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.facts.guard import Goal, Guard

Template = str | Mapping[str, str] | None
"""One prompt with {} for the subject, or one for each relation."""

Kind = Literal[
    "agrees", "differs", "unsure", "unchecked", "changed", "planned", "done", "failed", "right", "skipped", "lost",
    "conflict",
]  # fmt: skip
"""What a page of a set can be limited to: a verdict, or an outcome of the last correction."""
Approve = Literal["auto", "ask"]
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


class Policy(BaseModel):
    """How a set is corrected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unsure: Literal["fix", "leave"] = Field("fix", description="Facts whose verdict is unsure.")
    hand_edits: Literal["keep", "replace"] = Field(
        "keep",
        description="Active edits made by hand that contradict the list.",
    )
    conflicts: Literal["skip", "newest"] = Field(
        "skip", description="Facts that contradict each other; newest goes by as_of."
    )
    on_damage: Literal["revert", "retry", "stop"] = Field(
        "revert",
        description="When a fact becomes wrong: revert the edit that did it, retry it with the fact held, or "
        "stop.",
    )
    goal: Goal = Field("everywhere", description="As of apply_edits.")
    method: str = Field("auto", max_length=64, description="Editing method.")
    params: dict[str, Any] | None = Field(None, description="Its parameters.")
    guard: Guard | None = Field(None, description="Bounds for each batch.")
    batch: int = Field(10, ge=1, le=200, description="Facts computed together.")
