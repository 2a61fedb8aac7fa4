"""Jobs: long work that continues after the call that started it. State, progress and result."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from store.canonical import canonical_json, now, parse_json, storable_text
from store.chain import storable_or_none
from store.connection import Connection
from store.errors import BadFilter, LedgerError, NoSuchJob
from store.records import JobRecord

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled", "interrupted")
_FINAL = ("done", "failed", "cancelled")


class JobChanges(TypedDict, total=False):
    """The fields of a job that can change; those left out keep their value."""

    state: State
    progress: float  # 0..1
    message: str
    metrics: Sequence[Any]
    result: Mapping[str, Any] | None
    eta_seconds: float | None


class Jobs(Connection):
    """The jobs table. Jobs are working state: they have no events and are not in the hash chain."""

    def create_job(self, kind: str, request: Mapping[str, Any], client: str | None = None) -> JobRecord:
        """Create a job, in state "queued"."""
        with self._write() as db:
            seq = db.execute("SELECT coalesce(max(seq), 0) + 1 AS n FROM jobs").fetchone()["n"]
            at = now()
            db.execute(
                "INSERT INTO jobs (seq, id, kind, state, request, client, created, updated)"
                " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)",
                [seq, f"j{seq}", kind, canonical_json(request), storable_or_none(client), at, at],
            )
        return self.get_job(f"j{seq}")

    def update_job(self, job_id: str, **changes: Unpack[JobChanges]) -> JobRecord:
        """Change a job. `started` and `finished` are set from the state. Raises NoSuchJob."""
        at = now()
        unknown = changes.keys() - JobChanges.__annotations__.keys()
        if unknown:
            raise LedgerError(
                f"a job has no field {', '.join(sorted(unknown))}; it has {', '.join(JobChanges.__annotations__)}"
            )
        values: dict[str, Any] = {"updated": at}
        for name, value in changes.items():
            values[name] = (
                canonical_json(value) if name in ("metrics", "result") and value is not None else value
            )
        if changes.get("state") == "running":
            values["started"] = at
        if changes.get("state") in _FINAL:
            values["finished"] = at
        if isinstance(values.get("message"), str):
            values["message"] = storable_text(values["message"])
        sets = [f"{name} = coalesce(started, ?)" if name == "started" else f"{name} = ?" for name in values]
        with self._write() as db:
            cursor = db.execute(
                f"UPDATE jobs SET {', '.join(sets)} WHERE id = ?", [*values.values(), storable_text(job_id)]
            )
            if cursor.rowcount == 0:
                raise NoSuchJob(_unknown(job_id))
        return self.get_job(job_id)

    def get_job(self, job_id: str) -> JobRecord:
        """Read one job. Raises NoSuchJob."""
        row = self._row("SELECT * FROM jobs WHERE id = ?", (storable_text(job_id),))
        if row is None:
            raise NoSuchJob(_unknown(job_id))
        return _job(row)

    def list_jobs(self, state: str | None = None, limit: int = 50, offset: int = 0) -> list[JobRecord]:
        """Jobs, newest first. Raises BadFilter for a state that does not exist."""
        if state is not None and state not in STATES:
            raise BadFilter(f"state {state!r} does not exist; use one of {', '.join(STATES)}")
        where, params = ("WHERE state = ?", [state]) if state is not None else ("", [])
        rows = self._rows(
            f"SELECT * FROM jobs {where} ORDER BY seq DESC LIMIT ? OFFSET ?", [*params, limit, offset]
        )
        return [_job(row) for row in rows]

    def count_jobs(self) -> int:
        """How many jobs there are."""
        row = self._row("SELECT count(*) AS n FROM jobs", ())
        return int(row["n"]) if row is not None else 0

    def interrupt_running_jobs(self) -> list[str]:
        """Mark the jobs that were running when the last server ended; returns their ids."""
        with self._write() as db:
            running = db.execute("SELECT id FROM jobs WHERE state = 'running' ORDER BY seq").fetchall()
            db.execute(
                "UPDATE jobs SET state = 'interrupted', eta_seconds = NULL, updated = ?"
                " WHERE state = 'running'",
                [now()],
            )
        return [row["id"] for row in running]


def _unknown(job_id: str) -> str:
    return f"no job has the id {job_id[:80]!r}; list_jobs shows all jobs"


def _job(row: sqlite3.Row) -> JobRecord:
    values = {name: row[name] for name in JobRecord.__dataclass_fields__}
    request, metrics, result = (
        parse_json(row["request"], {}),
        parse_json(row["metrics"], []),
        parse_json(row["result"], None),
    )
    return JobRecord(**values | {"request": request, "metrics": metrics, "result": result})
