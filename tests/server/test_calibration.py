"""A model's profile: measured by a job on facts that the model knows, then read by edits that name no parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit, Neighbour
from editors.errors import InvalidEdit
from editors.measure import observe
from editors.model.lm import LM
from server.facts.guard import Guard
from server.facts.profile import profile_of
from server.facts.remembered import best_layers
from server.jobs import calibration, known_facts
from server.jobs.calibration import score, success
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.families import fresh

Open = Callable[[], Services]
OFF = Guard(off=("all",))
EDIT = Edit(subject="Oslo", prompt="{} lies in", target="Spain")
FACTS = [
    Edit(
        subject=name,
        prompt="The capital of {} is",
        target="Berlin",
        paraphrases=(f"{name} is governed from",),
        neighbours=(Neighbour(prompt="Big Ben stands in", answer="London"),),
    )
    for name in ("France", "Japan", "Egypt", "Kenya", "Poland", "Sweden", "India", "Brazil")
]


@pytest.fixture
def open_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Services on one home; what the tiny model knows, which is nothing, is given."""
    monkeypatch.setattr(calibration, "known_edits", lambda *_: FACTS)
    opened: list[Services] = []

    def start() -> Services:
        settings = Settings(home=tmp_path / "home")
        services = Services.open(settings, fresh("llama"), Ledger.open(settings.home), lambda *_: None)
        opened.append(services)
        return services

    yield start
    for services in opened:
        services.close()


def calibrated(services: Services, *methods: str) -> dict[str, Any]:
    started = services.jobs.calibrate_editing(list(methods) or None, 8)
    assert services.jobs.runner.wait(300)
    job = services.jobs.get(started.job_id)
    assert job.state == "done", job.message
    assert job.result is not None
    return job.result


def chosen(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Make the job find those parameters best for which `wanted` is true."""

    def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
        return next((point for point in tried if wanted(point["params"])), tried[0])

    monkeypatch.setattr(calibration, "_best", best)


def test_a_calibration_tries_layers_and_strengths_and_reports_on_other_facts(open_services: Open) -> None:
    services = open_services()
    before = services.workspace.host.rehash()
    result = calibrated(services, "rome", "memit")
    assert services.workspace.host.rehash() == before
    assert set(result["methods"]) == {"rome", "memit"}
    for found in result["methods"].values():
        clamps = {point["params"]["clamp"] for point in found["tried"]}
        layers = {
            json.dumps(point["params"].get("layer", point["params"].get("layers")))
            for point in found["tried"]
        }
        assert len(clamps) == 3
        assert len(layers) >= 2
        assert found["held_out"]["facts"] == 4
        assert found["params"] in [point["params"] for point in found["tried"]]
    assert len(result["summary"]) == 2
    assert "perplexity x" in result["summary"][0]
    assert json.loads(Path(result["file"]).read_text())["methods"] == result["methods"]
    assert services.jobs.curves(services.jobs.get("j1"))[:4] == b"\x89PNG"  # type: ignore[index]


def test_the_facts_that_choose_are_not_those_that_report(
    open_services: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, asked = open_services(), []

    def watched(lm: LM, edits: Any, **more: Any) -> Any:
        asked.append({edit.subject for edit in edits})
        return observe(lm, edits, **more)

    monkeypatch.setattr(calibration, "observe", watched)
    calibrated(services, "memit")
    *choosing, before, after = asked
    assert before == after == {edit.subject for edit in FACTS[4:]}
    assert all(subjects == {edit.subject for edit in FACTS[:4]} for subjects in choosing)


def test_edits_use_the_profile_where_they_name_no_parameters_and_say_so(
    open_services: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = open_services()
    usual = services.edits.preview([EDIT], method="rome", guard=OFF)
    assert "profile" not in usual.method_reason
    chosen(monkeypatch, lambda params: params["clamp"] == 3.0)
    result = calibrated(services, "rome")
    assert result["methods"]["rome"]["params"]["clamp"] == 3.0
    report = services.edits.preview([EDIT], method="rome", guard=OFF)
    assert report.params["clamp"] == 3.0
    note = report.method_reason
    assert "profile of this model" in note
    assert f"event {result['event']}" in note
    assert "clamp=3.0" in note
    assert "4 facts" in note
    named = services.edits.preview([EDIT], method="rome", params={"clamp": 7.0}, guard=OFF)
    assert named.params["clamp"] == 7.0


def test_the_profile_stands_on_the_ledger_and_is_read_at_the_next_start(
    open_services: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = open_services()
    chosen(monkeypatch, lambda params: params["layer"] == 2)
    calibrated(services, "rome")
    assert best_layers(services.workspace, "rome") == [2]
    assert best_layers(services.workspace, "memit") is None
    services.close()
    again = open_services()
    assert profile_of(again.workspace) is not None
    assert again.edits.preview([EDIT], method="rome", guard=OFF).params["layer"] == 2


def test_an_interrupted_calibration_measures_nothing_twice(
    open_services: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = open_services()
    computed: list[str] = []

    def counted(name: str) -> None:
        computed.append(name)
        if len(computed) == 3:
            services.jobs.runner._stopping.set()  # as a server does that is stopped

    original = calibration._CalibrationRun._group

    def group(self: Any, editor: Any, given: Any, edits: Any) -> Any:
        counted(str(given))
        return original(self, editor, given, edits)

    monkeypatch.setattr(calibration._CalibrationRun, "_group", group)
    started = services.jobs.calibrate_editing(["memit"], 8)
    assert services.jobs.runner.wait(120)
    assert services.jobs.get(started.job_id).state == "interrupted"
    services.close()
    again = open_services()
    assert again.jobs.runner.wait(120)
    assert again.jobs.get(started.job_id).state == "done"
    assert len(computed) == 6  # five points, and once more the one that was cut off


def test_a_model_that_knows_too_little_is_told_so(
    open_services: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = open_services()
    monkeypatch.setattr(calibration, "known_edits", lambda *_: FACTS[:5])
    started = services.jobs.calibrate_editing(["rome"], 8)
    assert services.jobs.runner.wait(60)
    job = services.jobs.get(started.job_id)
    assert job.state == "failed"
    assert "knows 5 of the shipped facts" in job.message
    assert profile_of(services.workspace) is None


def test_what_cannot_be_calibrated_is_refused_by_its_name(open_services: Open) -> None:
    services = open_services()
    with pytest.raises(InvalidEdit, match=r"methods\[1\] 'grace' cannot be calibrated; .*rome, memit"):
        services.jobs.calibrate_editing(["rome", "grace"], 8)


def test_success_is_no_mean_that_hides_a_rate_and_damage_costs() -> None:
    good = {"reliability": 1.0, "generality": 0.8, "locality": 0.9, "subject_locality": None}
    assert success(good) < 0.9
    assert success(good | {"locality": 0.0}) < 0.05
    scores = [score(good | {"perplexity_ratio": ratio}) for ratio in (0.98, 1.0, 1.05, 1.1, 1.5)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == scores[1]


def test_the_facts_of_a_calibration_are_known_to_the_model(
    default_lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    relations = [r for r in known_facts.relations() if r.name in ("capital", "language", "currency")]
    assert len(relations) >= 2
    monkeypatch.setattr(known_facts, "relations", lambda: relations)
    found = known_facts.known_edits(default_lm, 6, 0, lambda *_: None)
    assert found
    assert len({edit.subject for edit in found}) == len(found)
    seen = observe(default_lm, found)
    for edit in found:
        assert edit.target != edit.previous
        assert edit.previous is not None
        assert seen.answers[edit.text].casefold().startswith(edit.previous.casefold())
        assert all(n.answer != edit.previous for n in edit.neighbours)
        assert edit.paraphrases
