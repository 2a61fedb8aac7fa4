"""Jobs: one at a time, beside everything else, kept on disk, resumed after the end of a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit
from editors.errors import InvalidEdit, NotReady
from server.errors import ReadOnly, ServiceError
from server.jobs import training
from server.jobs.job import Job, job_folder
from server.jobs.runner import JobRunner
from server.jobs.service import JobService
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from store import Ledger
from store.errors import NoSuchJob
from tests import device
from tests.families import fresh
from tests.server.killed import run_until_killed

SMALL = {
    "rank": 4,
    "steps": 6,
    "records": 40,
    "validation": 8,
    "evaluate_every": 2,
    "group": 4,
    "patience": 9,
}
Open = Callable[[], Services]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def open_services(home: Path) -> Iterator[Open]:
    """Open the services on one home, as a started server does; what is still open is closed at the end."""
    all_opened: list[Services] = []

    def opened(read_only: bool = False) -> Services:
        settings = Settings(home=home, read_only=read_only)
        services = Services.open(
            settings, fresh("llama"), Ledger.open(home, read_only=read_only), lambda *_: None
        )
        all_opened.append(services)
        return services

    yield opened
    for services in all_opened:
        services.close()


def runner(services: Services) -> JobRunner:
    return services.jobs.runner


class Held:
    """Work that takes steps until it is let go; steps are recorded in the job's folder, as checkpoints are."""

    def __init__(self) -> None:
        self.stepping, self.release = threading.Event(), threading.Event()
        self.began: list[int] = []

    def __call__(self, workspace: Any, job: Job) -> Mapping[str, Any]:
        path = job.folder / "steps"
        done = int(path.read_text()) if path.exists() else 0
        self.began.append(done)
        while True:
            with job.turn():
                done += 1
                path.write_text(str(done))
            job.report(0.5, f"step {done}")
            job.metric({"step": done, "loss": 1.0})
            self.stepping.set()
            if self.release.is_set():
                return {"steps": done}


def with_work(services: Services, work: Any) -> JobRunner:
    services.jobs = JobService(services.workspace, {"test": work})
    return services.jobs.runner


def test_a_training_is_done_in_the_background_and_its_editor_can_be_used(open_services: Open) -> None:
    services = open_services()
    started = services.jobs.train_editor("mend", "facts", SMALL, ctx=RequestContext(client="me"))
    assert started.job_id == "j1"
    assert runner(services).wait(120)
    job = services.jobs.get("j1")
    assert job.state == "done", job.message
    assert job.progress == 1.0
    assert [m["step"] for m in job.metrics] == [2, 4, 6]
    assert job.request["params"]["seed"] == 0
    assert job.result is not None
    assert job.result["peak_memory_mb"] > 0
    report = services.edits.apply([Edit(subject="Oslo", prompt="{} lies in", target="Spain")], method="mend")
    assert report.edit_ids == ["e1"]
    assert not job_folder(services.workspace, "j1").exists()


def test_the_model_answers_while_a_job_runs(open_services: Open) -> None:
    services, work = open_services(), Held()
    jobs = with_work(services, work)
    jobs.submit("test", {}, None)
    assert work.stepping.wait(30)
    base = services.workspace.host.weights_hash
    services.facts.ask("The capital of France is", 3)
    services.edits.apply(
        [Edit(subject="Oslo", prompt="{} lies in", target="Spain")], method="ft", params={"max_steps": 2}
    )
    assert services.jobs.get("j1").state == "running"
    assert services.workspace.host.weights_hash != base
    work.release.set()
    assert jobs.wait(30)
    assert services.jobs.get("j1").state == "done"


def test_a_job_sees_the_pristine_model_whatever_is_edited(open_services: Open) -> None:
    services = open_services()
    services.edits.apply(
        [Edit(subject="Oslo", prompt="{} lies in", target="Spain")], method="ft", params={"max_steps": 2}
    )

    def work(workspace: Any, job: Job) -> Mapping[str, Any]:
        with job.turn():
            return {"hash": workspace.host.rehash()}

    jobs = with_work(services, work)
    jobs.submit("test", {}, None)
    assert jobs.wait(30)
    result = services.jobs.get("j1").result
    assert result == {"hash": services.workspace.host.base_hash}
    assert services.workspace.host.rehash() != services.workspace.host.base_hash


def test_cancelling_leaves_nothing_running_and_nothing_on_disk(open_services: Open) -> None:
    services, work = open_services(), Held()
    jobs = with_work(services, work)
    jobs.submit("test", {}, None)
    jobs.submit("test", {}, None)
    assert work.stepping.wait(30)
    assert services.jobs.cancel("j2").state == "cancelled"
    assert services.jobs.cancel("j1").state == "cancelled"
    assert jobs.wait(30)
    assert not [t for t in threading.enumerate() if t.name == "errata-jobs"]
    assert not job_folder(services.workspace, "j1").exists()
    assert work.began == [0]
    assert services.jobs.cancel("j1").state == "cancelled"  # again: no error


def test_a_stopped_server_goes_on_with_its_jobs_at_the_next_start(open_services: Open, home: Path) -> None:
    services, work = open_services(), Held()
    with_work(services, work).submit("test", {}, None)
    assert work.stepping.wait(30)
    services.close()
    ledger = Ledger.open(home)
    assert ledger.get_job("j1").state == "interrupted"
    ledger.close()
    again = open_services()  # its own table of work does not know this kind, and says so
    assert runner(again).wait(30)
    assert again.jobs.get("j1").state == "failed"


def test_a_resumed_job_finds_its_checkpoint(open_services: Open) -> None:
    services, work = open_services(), Held()
    jobs = with_work(services, work)
    jobs.submit("test", {}, None)
    assert work.stepping.wait(30)
    jobs.stop()
    again = Held()
    again.release.set()
    resumed = with_work(services, again)
    resumed.resume()
    assert resumed.wait(30)
    assert again.began[0] >= 1
    job = services.jobs.get("j1")
    assert job.state == "done"
    steps = [m["step"] for m in job.metrics]
    assert steps == sorted(set(steps))


KILLED = """
import os, sys
from pathlib import Path

from server.request_context import RequestContext
from server.settings import Settings
from server.services import Services
from store import Ledger
from tests import device
from tests.families import fresh
home, device.chosen = Path(sys.argv[1]), sys.argv[2]
services = Services.open(Settings(home=home), fresh("llama"), Ledger.open(home), lambda *_: None)
services.jobs.train_editor("mend", "facts", {params})

while True:
    job = services.jobs.get("j1")
    if job.metrics:
        os.kill(os.getpid(), 9)
    if job.state in ("done", "failed"):
        sys.exit(job.message)
"""


def test_a_training_killed_in_the_middle_ends_with_the_same_metrics(
    open_services: Open, home: Path, tmp_path: Path
) -> None:
    run_until_killed(KILLED.replace("{params}", repr(SMALL)), str(home), device.chosen)
    services = open_services()
    assert runner(services).wait(120)
    killed = services.jobs.get("j1")
    assert killed.state == "done", killed.message
    services.jobs.train_editor("mend", "facts", SMALL)
    assert runner(services).wait(120)
    whole = services.jobs.get("j2")
    assert [m["step"] for m in killed.metrics] == [m["step"] for m in whole.metrics]
    for one, two in zip(killed.metrics, whole.metrics, strict=True):
        assert one == pytest.approx(two, abs=1e-3)


def test_a_job_of_another_model_waits_for_it(open_services: Open) -> None:
    services = open_services()
    services.workspace.ledger.create_job("train_editor", {"model_hash": "another", "model": "gpt2"})
    runner(services).resume()
    assert runner(services).wait(5)
    job = services.jobs.get("j1")
    assert job.state == "queued"


def test_wrong_requests_are_refused_before_a_job_is_made(open_services: Open) -> None:
    services = open_services()
    data_folder = services.workspace.settings.home / "data"
    data_folder.mkdir()
    bad = data_folder / "bad.json"
    bad.write_text(json.dumps([{"subject": "x"}]))
    for data, params, said in (
        ("facts", {"stepz": 3}, "stepz"),
        ("facts", {"steps": 0}, "steps"),
        ("facts", {"layers": [99]}, "99"),
        ("facts", {"preset": "best"}, "'best' is not a preset of the training of mend; it has \"published\""),
        (str(data_folder / "none.json"), {}, "none.json' is not there"),
        (str(bad), {}, "line 1"),
        ("bad.json", {}, "line 1"),
    ):
        with pytest.raises((InvalidEdit, ServiceError), match=said):
            services.jobs.train_editor("mend", data, params)
    with pytest.raises(InvalidEdit, match="layer 99"):
        services.jobs.compute_statistics([99], None, None)
    assert services.jobs.list(limit=10).jobs == []
    with pytest.raises(NoSuchJob, match="'j9'; list_jobs"):
        services.jobs.get("j9")


def test_the_published_preset_of_a_training_gives_the_papers_values(open_services: Open) -> None:
    workspace = open_services().workspace
    n = workspace.lm.n_layers
    published = training.check(workspace, "mend", "facts", {"preset": "published", "steps": 7})["params"]
    assert published["layers"] == list(range(max(0, n - 3), n))
    assert (published["contrast"], published["steps"]) == (0, 7)
    assert (
        training.check(workspace, "mend", "facts", {"preset": "published", "contrast": 2})["params"][
            "contrast"
        ]
        == 2
    )
    assert training.check(workspace, "mend", "facts", None)["params"]["contrast"] > 0
    with pytest.raises(InvalidEdit, match="not a preset of the training of serac; it has none"):
        training.check(workspace, "serac", "facts", {"preset": "published"})


@pytest.mark.parametrize("method", ["mend", "serac"])
def test_a_method_that_is_not_trained_is_refused_before_the_model_is_asked(
    method: str, open_services: Open
) -> None:
    heard: list[str] = []
    with pytest.raises(NotReady, match=rf'{method} needs .* train_editor\(method="{method}"\)'):
        open_services().edits.apply(
            [Edit(subject="Oslo", prompt="{} lies in", target="Spain")],
            method=method,
            ctx=RequestContext(progress=lambda _done, _total, message: heard.append(message)),
        )
    assert heard == []


def test_a_read_only_server_starts_no_job(open_services: Any) -> None:
    open_services().close()
    services = open_services(read_only=True)
    with pytest.raises(ReadOnly):
        services.jobs.train_editor("mend", "facts", None)


def test_statistics_tell_their_condition_and_are_used(open_services: Open) -> None:
    services = open_services()
    corpus = services.workspace.settings.home / "data" / "corpus.txt"
    corpus.parent.mkdir()
    corpus.write_text("The capital of France is Paris, and people there speak French. " * 60)
    for request in ((None, None, None), ([1], 600, None), ([0], 200, str(corpus))):
        services.jobs.compute_statistics(*request)
    assert runner(services).wait(120)
    whole, more, own = (services.jobs.get(f"j{i}") for i in (1, 2, 3))
    for job in (whole, more, own):
        assert job.state == "done", job.message
        assert job.result is not None
    assert [r["layer"] for r in whole.result["layers"]] == [0, 1, 2, 3]
    assert all(
        r["condition"] is None or r["condition_with_ridge"] < r["condition"] for r in whole.result["layers"]
    )
    assert all(1 <= r["effective_rank"] <= r["width"] for r in whole.result["layers"])
    assert more.result["layers"][0]["tokens"] >= 600 > whole.result["layers"][1]["tokens"]
    assert own.result["sample"].startswith("corpus")
    assert services.workspace.statistics.missing([0, 1, 2, 3]) == []
    services.edits.apply(
        [Edit(subject="Oslo", prompt="{} lies in", target="Spain")], method="rome", params={"max_steps": 2}
    )


def test_a_paused_job_waits_over_a_restart_and_goes_on_where_it_was(open_services: Open) -> None:
    services, work = open_services(), Held()
    jobs = with_work(services, work)
    jobs.submit("test", {"what": 1}, None)
    jobs.submit("test", {"what": 2}, None)
    assert work.stepping.wait(30)
    paused = services.jobs.pause("j1")
    assert (paused.state, "resume" in paused.message) == ("interrupted", True)
    assert services.jobs.pause("j2").state == "interrupted"
    assert jobs.wait(30)
    done = int((job_folder(services.workspace, "j1") / "steps").read_text())
    services.close()

    again = open_services()
    after = Held()
    jobs = with_work(again, after)
    again.jobs.resume()
    assert jobs.wait(30)
    assert after.began == [], "what is paused is not taken up by a start"
    same = again.jobs.start("test", {"what": 1})
    assert (same.job_id, same.state) == ("j1", "interrupted"), "the same work is not started beside it"
    after.release.set()
    assert again.jobs.go_on("j1").state in ("queued", "running", "done")
    assert jobs.wait(30)
    assert after.began == [done]
    assert again.jobs.get("j1").state == "done"
    assert again.jobs.pause("j1").state == "done", "what has ended stays"
    assert again.jobs.go_on("j1").state == "done"
    assert again.jobs.cancel("j2").state == "cancelled"
    with pytest.raises(NoSuchJob):
        again.jobs.pause("j9")


ROWS = [f"Town {i};Town {i} lies in the country of;Land {i % 7}" for i in range(30)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.csv", "\n".join(["Ort;Satz;Soll", *ROWS])),
        (
            "f.jsonl",
            "\n".join(
                json.dumps({"subject": f"Town {i}", "prompt": "{} lies in", "target": "Rome", "reason": "x"})
                for i in range(30)
            ),
        ),
        (
            "f.json",
            json.dumps(
                [{"subject": f"Town {i}", "prompt": "{} lies in", "answer": "Rome"} for i in range(30)]
            ),
        ),
        (
            "knowedit.json",
            json.dumps(
                [
                    {"subject": f"Town {i}", "prompt": f"Where is Town {i}?", "target_new": "Rome"}
                    | {"ground_truth": "Oslo", "portability": {}, "locality": {}}
                    for i in range(30)
                ]
            ),
        ),
    ],
)
def test_an_editor_is_trained_on_what_fact_sets_are_read_from(
    open_services: Open, home: Path, name: str, text: str
) -> None:
    services = open_services()
    (home / "data").mkdir(exist_ok=True)
    (home / "data" / name).write_text(text, "utf-8")
    services.jobs.train_editor("mend", name, SMALL | {"steps": 2, "records": 30})
    assert runner(services).wait(120)
    job = services.jobs.get("j1")
    assert job.state == "done", job.message
    assert job.request["records"] == 30


def test_what_no_training_can_read_is_named_by_line_and_field(open_services: Open, home: Path) -> None:
    services = open_services()
    (home / "data").mkdir(exist_ok=True)
    (home / "data" / "f.csv").write_text("Ort;Soll\nPeru;\n", "utf-8")
    with pytest.raises(ServiceError, match="no column with prompts"):
        services.jobs.train_editor("mend", "f.csv", SMALL)
    (home / "data" / "f.jsonl").write_text(
        '{"subject": "Peru", "prompt": "Chad is", "target": "x"}\n', "utf-8"
    )
    with pytest.raises((InvalidEdit, ServiceError), match=r"f\.jsonl, line 1"):
        services.jobs.train_editor("mend", "f.jsonl", SMALL)
