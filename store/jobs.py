"""Long work that outlives a call: its state, progress and result."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from store.canonical import canonical, clean, now, parsed
from store.chain import tidy
from store.connection import Connection
from store.errors import BadFilter, LedgerError, NoSuchJob
from store.records import JobRecord

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled", "interrupted")
_FINAL = ("done", "failed", "cancelled")


class JobChanges(TypedDict, total=False):
    """What can change about a job; what is left out stays."""

    state: State
    progress: float  # 0..1
    message: str
    metrics: Sequence[Any]
    result: Mapping[str, Any] | None
    eta_seconds: float | None


class Jobs(Connection):
    """The jobs of the ledger. They are working state: no events, no hash chain."""

    def create_job(self, kind: str, request: Mapping[str, Any], client: str | None = None) -> JobRecord:
        """A new job, queued."""
        with self._write() as db:
            seq = db.execute("SELECT coalesce(max(seq), 0) + 1 AS n FROM jobs").fetchone()["n"]
            at = now()
            db.execute(
                "INSERT INTO jobs (seq, id, kind, state, request, client, created, updated)"
                " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
                [seq, f"j{seq}", kind, canonical(request), tidy(client), at, at],
            )
        return self.get_job(f"j{seq}")

    def update_job(self, job_id: str, **changes: Unpack[JobChanges]) -> JobRecord:
        """Change a job; its times follow from its state. Raises NoSuchJob."""
        at = now()
        unknown = changes.keys() - JobChanges.__annotations__.keys()
        if unknown:
            raise LedgerError(f"a job has no {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {"updated": at}
        for name, value in changes.items():
            values[name] = canonical(value) if name in ("metrics", "result") and value is not None else value
        if changes.get("state") == "running":
            values["started"] = at
        if changes.get("state") in _FINAL:
            values["finished"] = at
        if isinstance(values.get("message"), str):
            values["message"] = clean(values["message"])
        sets = [f"{name} = coalesce(started, ?)" if name == "started" else f"{name} = ?" for name in values]
        with self._write() as db:
            done = db.execute(
                f"UPDATE jobs SET {', '.join(sets)} WHERE id = ?", [*values.values(), clean(job_id)]
            )
            if done.rowcount == 0:
                raise NoSuchJob(_unknown(job_id))
        return self.get_job(job_id)

    def get_job(self, job_id: str) -> JobRecord:
        """One job. Raises NoSuchJob."""
        row = self._row("SELECT * FROM jobs WHERE id = ?", (clean(job_id),))
        if row is None:
            raise NoSuchJob(_unknown(job_id))
        return _job(row)

    def list_jobs(self, state: str | None = None, limit: int = 50) -> list[JobRecord]:
        """Jobs, newest first. Raises BadFilter for a state that does not exist."""
        if state is not None and state not in STATES:
            raise BadFilter(f"state {state!r} does not exist; use one of {', '.join(STATES)}")
        where, params = ("WHERE state = ?", [state]) if state is not None else ("", [])
        rows = self._rows(f"SELECT * FROM jobs {where} ORDER BY seq DESC LIMIT ?", [*params, limit])
        return [_job(row) for row in rows]

    def interrupt_running_jobs(self) -> list[str]:
        """Mark what was running when the last server died; returns the ids."""
        with self._write() as db:
            running = db.execute("SELECT id FROM jobs WHERE state = 'running' ORDER BY seq").fetchall()
            db.execute(
                "UPDATE jobs SET state = 'interrupted', eta_seconds = NULL, updated = ?"
                " WHERE state = 'running'",
                [now()],
            )
        return [row["id"] for row in running]


def _unknown(job_id: str) -> str:
    return f"no job has the id {job_id[:80]!r}; list_jobs has those there are"


def _job(row: sqlite3.Row) -> JobRecord:
    values = {name: row[name] for name in JobRecord.__dataclass_fields__}
    request, metrics, result = (
        parsed(row["request"], {}),
        parsed(row["metrics"], []),
        parsed(row["result"], None),
    )
    return JobRecord(**values | {"request": request, "metrics": metrics, "result": result})
