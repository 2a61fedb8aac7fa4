"""Long work in the background: one job at a time, on the ledger, resumed after a crash.

A job holds the model for one short step at a time (`turn`), so that others can ask and edit meanwhile. Its
checkpoints are under HOME/trained/<job>. A job that was running or waiting when the server stopped, killed or
not, continues by itself at the next start with the same model.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from editors.errors import Cancelled, EditError
from server.errors import ServiceError
from server.exhausted import exhausted
from server.jobs.job import PAUSED, Job, Stopped, is_paused, job_folder
from server.priority import give_way
from server.transaction.workspace import Workspace
from store import JobRecord
from store.errors import LedgerError

log = logging.getLogger("errata.jobs")

PENDING = ("interrupted", "queued")
WHEN_PAUSED = 'paused; cancel_job with action="resume" lets it go on'

Work = Callable[[Workspace, "Job"], Mapping[str, Any]]


class JobRunner:
    """Runs the jobs of one ledger, one after another, in a thread that lives while there are any."""

    def __init__(self, workspace: Workspace, work: Mapping[str, Work]) -> None:
        self._workspace, self._work = workspace, work
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._waiting: list[str] = []
        self._running: Job | None = None
        self._thread: threading.Thread | None = None

    def resume(self, left_to_others: Collection[str] = ()) -> None:
        """Queue the jobs that were waiting or interrupted when the last server ended. Jobs of other models, and of
        kinds that another runner does, are left. A job of an unknown kind is queued too, and fails with a message
        that names it.
        """
        waiting = [j for state in PENDING for j in self._workspace.ledger.list_jobs(state, limit=1000)]
        for record in sorted(waiting, key=lambda j: int(j.id[1:])):
            mine = record.kind not in left_to_others and not is_paused(self._workspace, record.id)
            if mine and record.request.get("model_hash") == self._workspace.base_hash:
                self._enqueue(record.id)

    def submit(self, kind: str, request: Mapping[str, Any], client: str | None) -> JobRecord:
        """A new job, run when those before it are done. `request` is JSON and says everything the work needs."""
        full = {**request, "model_hash": self._workspace.base_hash, "model": self._workspace.lm.name}
        record = self._workspace.ledger.create_job(kind, full, client)
        self._enqueue(record.id)
        return record

    def cancel(self, job_id: str) -> JobRecord:
        """End a job; a running one ends within a step. One that has ended stays as it is."""
        running, record = self._taken_out(job_id)
        if running is not None:
            running.cancelled.set()
            return record
        if record.state in PENDING:
            shutil.rmtree(job_folder(self._workspace, job_id), ignore_errors=True)
            return self._workspace.ledger.update_job(
                job_id, state="cancelled", message="cancelled", eta_seconds=None
            )
        return record

    def pause(self, job_id: str) -> JobRecord:
        """Pause a job until it is resumed, also over restarts. A running one stops after its step and keeps its
        checkpoint. One that has ended stays as it is.
        """
        record = self._workspace.ledger.get_job(job_id)
        if record.state in ("done", "failed", "cancelled"):
            return record
        folder = job_folder(self._workspace, job_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAUSED).touch()
        running, record = self._taken_out(job_id)
        if running is not None:
            running.paused.set()
            return record
        if record.state not in PENDING:  # it ended in between, and removed its folder
            shutil.rmtree(folder, ignore_errors=True)
            return record
        return self._workspace.ledger.update_job(
            job_id, state="interrupted", message=WHEN_PAUSED, eta_seconds=None
        )

    def _taken_out(self, job_id: str) -> tuple[Job | None, JobRecord]:
        """Take a job out of the queue if it waits there. Returns the job if it runs now, else None; and its record."""
        with self._mutex:
            running = self._running_as(job_id)
            if running is None and job_id in self._waiting:
                self._waiting.remove(job_id)
        return running, self._workspace.ledger.get_job(job_id)

    def _running_as(self, job_id: str) -> Job | None:
        """The running job if it has this id, else None. Call it while holding the mutex."""
        return self._running if self._running is not None and self._running.id == job_id else None

    def go_on(self, job_id: str) -> JobRecord:
        """Resume a paused job; any other job stays as it is.

        Raises ServiceError for a job of another model, and for one whose last step has not ended yet.
        """
        record = self._workspace.ledger.get_job(job_id)
        if not is_paused(self._workspace, job_id) or record.state not in PENDING:
            return record
        if record.request.get("model_hash") != self._workspace.base_hash:
            raise ServiceError(
                f"{job_id} is a job for the model {record.request.get('model')!r}; start the server with that one"
            )
        with self._mutex:
            ending = self._running_as(job_id)
        if ending is not None:
            raise ServiceError(
                f"{job_id} has not yet ended the step in which it was paused; resume it when get_job says interrupted"
            )
        (job_folder(self._workspace, job_id) / PAUSED).unlink()
        record = self._workspace.ledger.update_job(job_id, state="queued", message="goes on")
        self._enqueue(job_id)
        return record

    def stop(self, timeout: float = 60.0) -> None:
        """End the running job at its next step, keeping it for the next start; waits for that."""
        self._stopping.set()
        with self._mutex:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def wait(self, timeout: float) -> bool:
        """Wait until no job runs or waits; False when the time is up first."""
        with self._mutex:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def settled(self, job_id: str, timeout: float) -> bool:
        """Wait until a job no longer runs; False when the time is up first."""
        with self._mutex:
            job = self._running_as(job_id)
        return job is None or job.ended.wait(timeout)

    def has(self, job_id: str) -> bool:
        """Whether a job runs or waits here."""
        with self._mutex:
            return job_id in self._waiting or self._running_as(job_id) is not None

    def _enqueue(self, job_id: str) -> None:
        with self._mutex:
            self._waiting.append(job_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="errata-jobs", daemon=True)
                self._thread.start()

    def _next(self) -> Job | None:
        with self._mutex:
            if not self._waiting or self._stopping.is_set():
                self._running = self._thread = None
                return None
            record = self._workspace.ledger.get_job(self._waiting.pop(0))
            self._running = Job(self._workspace, record, self._stopping)
            return self._running

    def _run(self) -> None:
        give_way()
        try:
            while (job := self._next()) is not None:
                try:
                    self._do(job)
                finally:
                    job.ended.set()
        except Exception:  # the ledger itself failed: nothing can be recorded
            log.exception("the job thread ended")
            with self._mutex:
                self._running = self._thread = None

    def _do(self, job: Job) -> None:
        update = self._workspace.ledger.update_job
        record = update(job.id, state="running", message="starting", eta_seconds=None)
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            result = self._work[record.kind](self._workspace, job)
        except Cancelled:
            self._end(job, "cancelled", "cancelled")
        except Stopped:
            update(
                job.id,
                state="interrupted",
                message=WHEN_PAUSED if job.paused.is_set() else "interrupted; continues at the next start",
                eta_seconds=None,
            )
        except (EditError, ServiceError, LedgerError, OSError) as error:
            self._end(job, "failed", exhausted(error) or str(error))
        except Exception as error:
            log.exception("job %s failed", job.id)
            unforeseen = f"internal error ({type(error).__name__}: {error}); the log has the details"
            self._end(job, "failed", exhausted(error) or unforeseen)
        else:
            update(job.id, result=dict(result), progress=1.0)
            self._end(job, "done", str(result.get("summary") or "done"))

    def _end(self, job: Job, state: Any, message: str) -> None:
        shutil.rmtree(job.folder, ignore_errors=True)
        self._workspace.ledger.update_job(job.id, state=state, message=message, eta_seconds=None)
