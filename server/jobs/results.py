"""Results of the training tools."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.results import Result

JobState = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
ENDED = ("done", "failed", "cancelled")
"""States that a job never leaves."""


class JobStarted(Result):
    job_id: str
    state: JobState
    kind: str
    message: str = ""
    next: str = Field(description="What to do next.")


class JobRow(Result):
    """One job in short."""

    job_id: str
    kind: str
    method: str | None = Field(None, description="The editor that is trained; None for statistics.")
    state: JobState
    progress: float = Field(description="0..1")
    message: str
    created: str
    finished: str | None = None


class JobInfo(JobRow):
    """One job with its curves and result."""

    request: dict[str, Any] = Field(description="The request, with its seed and parameters.")
    metrics: list[dict[str, Any]] = Field(description="Points of the curves, oldest first.")
    eta_seconds: float | None = Field(None, description="Estimated seconds left; None when not running.")
    result: dict[str, Any] | None = None
    next: str = ""


class JobList(Result):
    jobs: list[JobRow]
