"""The bounds a transaction must keep, or be undone."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from editors.constants import assumed

Goal = Literal["everywhere", "export"]
"""What an edit is for: to hold wherever people ask, or to be exported as plain weights."""
Standing = Literal["reliability", "perplexity", "subject_locality", "active_edits", "holds", "all"]
"""The standing bounds, which apply without being asked for, by name."""

PERPLEXITY_RATIO = assumed(
    1.1,
    "Greatest perplexity on the canary texts after one edit, divided by that before it, unless a guard says otherwise.",
    "Ordinary single edits give 1.0 to 1.02; edits that broke the default model gave 2 to 8.",
)
SUBJECT_LOCALITY = assumed(
    0.5,
    "Least share of the subjects' other facts that a call must keep, unless a guard gives another.",
    "With fewer left, an edit has destroyed more of its subject than it has mended.",
)
LOST_EDITS = assumed(
    0.1,
    "Greatest share of the active edits asked that may cease to hold in a call, unless a guard says otherwise.",
    "None of fewer than ten; on top of many, one that slips must not forbid every further edit.",
)


class Guard(BaseModel):
    """Bounds on the measured result; those of reliability, perplexity, subject and active edits stand unless `off`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_reliability: float | None = Field(
        None, ge=0, le=1, description="Least mean reliability; left out: 1."
    )
    min_generality: float | None = Field(None, ge=0, le=1, description="Least mean generality.")
    min_locality: float | None = Field(None, ge=0, le=1, description="Least mean locality.")
    min_reworded: float | None = Field(None, ge=0, le=1, description="Least share of reworded statements.")
    min_chat: float | None = Field(None, ge=0, le=1, description="Least share of chat questions.")
    min_chat_reworded: float | None = Field(
        None, ge=0, le=1, description="Least share of reworded chat questions."
    )
    min_language: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Least share in other languages.",
    )
    min_subject_locality: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"Least share of the subjects' other facts kept; left out: {SUBJECT_LOCALITY}.",
    )
    max_lost_edits: int | None = Field(
        None,
        ge=0,
        description="Most active edits that may cease to hold; left out: a tenth, none of fewer than ten.",
    )
    max_changed: int | None = Field(None, ge=0, description="Most facts in `changed`.")
    max_perplexity_ratio: float | None = Field(
        None,
        ge=1,
        description=f"Most perplexity after the call, over that before; left out: {PERPLEXITY_RATIO} for one edit, 0.1 "
        "more for ten.",
    )
    max_drift: float | None = Field(None, ge=0, description="Most mean KL from the pristine model, nats.")
    off: tuple[Standing, ...] = Field(
        (),
        description="Standing bounds to switch off.",
    )

    def stands(self, name: Standing) -> bool:
        """Whether a standing bound holds: it is not switched off."""
        return name not in self.off and "all" not in self.off

    def standing(self, edits: int, watched: int = 0) -> Guard:
        """The same with the values of the standing bounds filled in.

        Args:
            edits: edits of the call.
            watched: active edits that are asked before and after.
        """
        ratio = 1 + (PERPLEXITY_RATIO - 1) * (1 + math.log10(max(1, edits)))
        defaults = {
            "min_reliability": ("reliability", 1.0),
            "max_perplexity_ratio": ("perplexity", round(ratio, 3)),
            "min_subject_locality": ("subject_locality", SUBJECT_LOCALITY),
            "max_lost_edits": ("active_edits", int(LOST_EDITS * watched)),
        }
        filled = {
            field: value
            for field, (name, value) in defaults.items()
            if getattr(self, field) is None and self.stands(name)  # type: ignore[arg-type]
        }
        guard = self.model_copy(update=filled)
        guard.model_fields_set.difference_update(filled)  # `given` must not count them as the caller's
        return guard

    def given(self, name: str) -> bool:
        """Whether the caller named this bound."""
        return name in self.model_fields_set


UNGUARDED = Guard(off=("all",))
