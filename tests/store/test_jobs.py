from __future__ import annotations

from pathlib import Path

import pytest

from store import BadFilter, Ledger, LedgerError, NoSuchJob


def test_a_job_goes_from_queued_to_done_and_remembers_when(ledger: Ledger) -> None:
    job = ledger.create_job("statistics", {"layers": [1, 2]}, client="someone")
    assert (job.id, job.state, job.progress, job.request) == ("j1", "queued", 0.0, {"layers": [1, 2]})
    assert (job.started, job.finished, job.client) == (None, None, "someone")
    running = ledger.update_job("j1", state="running", progress=0.5, message="half", eta_seconds=3.0)
    assert (running.progress, running.message, running.eta_seconds) == (0.5, "half", 3.0)
    assert running.started is not None
    again = ledger.update_job("j1", state="running", metrics=[{"loss": 1.5}])
    assert (again.started, again.message, again.metrics) == (running.started, "half", [{"loss": 1.5}])
    done = ledger.update_job("j1", state="done", result={"path": "x"}, eta_seconds=None)
    assert (done.state, done.result, done.eta_seconds) == ("done", {"path": "x"}, None)
    assert done.finished is not None
    assert ledger.get_job("j1") == done


def test_jobs_that_were_running_are_interrupted_after_a_restart(home: Path) -> None:
    with Ledger.open(home) as ledger:
        for _ in range(3):
            ledger.create_job("train", {})
        ledger.update_job("j1", state="done")
        ledger.update_job("j2", state="running")
    with Ledger.open(home) as ledger:
        assert ledger.interrupt_running_jobs() == ["j2"]
        assert [(job.id, job.state) for job in ledger.list_jobs()] == [
            ("j3", "queued"),
            ("j2", "interrupted"),
            ("j1", "done"),
        ]
        assert [job.id for job in ledger.list_jobs(state="interrupted")] == ["j2"]


def test_what_does_not_exist_is_named(ledger: Ledger) -> None:
    for wrong in ("j1", "", "\ud800"):
        with pytest.raises(NoSuchJob):
            ledger.get_job(wrong)
    with pytest.raises(NoSuchJob, match="j4"):
        ledger.update_job("j4", progress=1.0)
    with pytest.raises(BadFilter, match="paused"):
        ledger.list_jobs(state="paused")
    ledger.create_job("train", {})
    with pytest.raises(LedgerError, match="nothing was recorded"):
        ledger.update_job("j1", state="paused")  # type: ignore[arg-type]
    with pytest.raises(LedgerError, match="color"):
        ledger.update_job("j1", color="red")  # type: ignore[call-arg]
