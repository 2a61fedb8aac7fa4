"""One job: its record, and the methods that its work may call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.errors import Cancelled
from editors.model.lm import LM
from server.request_context import RequestContext
from server.transaction.workspace import Workspace
from store import JobRecord

UPDATE_SECONDS = 1.0
"""Least time between two updates of a job's row."""
PAUSED = "paused"
"""A file in a job's folder that marks it as paused, so that no start resumes it."""


class Stopped(Exception):
    """The server is stopping, or the job is paused; it continues at the next start, or when it is resumed."""


class Job:
    """A running job, as its work sees it (the `Monitor` of editors.training_spec)."""

    def __init__(self, workspace: Workspace, record: JobRecord, stopping: threading.Event) -> None:
        self.workspace, self.id, self.request = workspace, record.id, record.request
        self.folder = job_folder(workspace, record.id)
        self.client, self.created = record.client, record.created
        self.model_hash = workspace.base_hash
        self.cancelled, self.paused = threading.Event(), threading.Event()
        self.ended = threading.Event()
        self._stopping = stopping
        self._metrics: list[Any] = list(record.metrics)
        self._written = 0.0
        self._began: tuple[float, float] | None = None  # time and progress of the first report

    def check(self) -> None:
        """Raise Cancelled or Stopped if the job should end."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled")
        if self._stopping.is_set() or self.paused.is_set():
            raise Stopped

    @contextmanager
    def turn(self) -> Iterator[LM]:
        """The pristine model, for one short step."""
        with self.workspace.turn(check=self.check, bounded=False), self.workspace.host.pristine():
            yield self.workspace.lm

    @contextmanager
    def live_turn(self) -> Iterator[LM]:
        """The live model with its active edits, for one step that may change it."""
        with self.workspace.turn(check=self.check, bounded=False):
            yield self.workspace.lm

    def report(self, fraction: float, message: str) -> None:
        """Progress in 0..1; the time left follows from the rate so far."""
        self.check()
        now = time.monotonic()
        if self._began is None:
            self._began = (now, fraction)
        if now - self._written < UPDATE_SECONDS:
            return
        self._written = now
        began, at = self._began
        eta = (now - began) * (1 - fraction) / (fraction - at) if fraction > at else None
        self.workspace.ledger.update_job(self.id, progress=fraction, message=message, eta_seconds=eta)

    def metric(self, values: Mapping[str, float]) -> None:
        """One point of the curves. After a resume, a point of a step that was done before replaces the earlier
        point."""
        step = values.get("step")
        self._metrics = [m for m in self._metrics if step is None or m.get("step", -1) < step]
        self._metrics.append(dict(values))
        self.workspace.ledger.update_job(self.id, metrics=self._metrics)


@dataclass(frozen=True)
class JobContext(RequestContext):
    """The request that a job makes of the services: its client's name, its progress, its end."""

    job: Job | None = None

    @classmethod
    def of(cls, job: Job, start: float = 0.0, end: float = 1.0, what: str = "") -> JobContext:
        """The context of a part of a job's work, whose progress fills `start`..`end` of the job's."""

        def progress(done: float, total: float, message: str) -> None:
            share = done / total if total > 0 else 0.0
            job.report(start + (end - start) * share, f"{what}: {message}" if what else message)

        return cls(
            client=job.client,
            request_id=job.id,
            identity=job.request.get("identity"),
            progress=progress,
            cancelled=job.cancelled,
            job=job,
        )

    def check(self) -> None:
        """Raise Cancelled or Stopped when the job should end."""
        if self.job is not None:
            self.job.check()


def is_paused(workspace: Workspace, job_id: str) -> bool:
    """Whether a job is paused."""
    return (job_folder(workspace, job_id) / PAUSED).exists()


def job_folder(workspace: Workspace, job_id: str) -> Path:
    """Where a job keeps its checkpoints."""
    return workspace.settings.home / "trained" / job_id
