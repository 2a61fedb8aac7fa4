"""The bounds a transaction must keep, or be undone."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Guard(BaseModel):
    """Bounds on the measured result; a bound that is None is not looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_reliability: float | None = Field(None, ge=0, le=1, description="Least mean reliability.")
    min_generality: float | None = Field(None, ge=0, le=1, description="Least mean generality.")
    min_locality: float | None = Field(None, ge=0, le=1, description="Least mean locality.")
    max_drift: float | None = Field(None, ge=0, description="Greatest mean KL from the pristine model, nats.")
