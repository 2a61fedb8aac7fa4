"""What a rebase is asked to do. Imports nothing heavy, so that the tools can use it at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from server.facts.guard import Guard

Approve = Literal["auto", "ask"]
SAME = "same"
"""As a method: each edit by the method that it was made with."""


class RebaseWishes(BaseModel):
    """How edits are carried over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = SAME  # of those that are computed anew
    guard: Guard | None = None  # for every transaction
