"""Edits of several methods in one stack: any of them goes as if it had never been, also over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit
from editors.errors import EditError
from editors.steering.pairs import Pair
from server.errors import ServiceError
from server.services import Services
from server.steering.requests import DoseRequest, VectorRequest
from tests.editors.trained import trained_for
from tests.server.opened import FACTS, STRONG, open_services

SHORT: dict[str, Any] = {"max_steps": 4}
CALLS: tuple[tuple[str, dict[str, Any], tuple[Edit, ...]], ...] = (
    ("rome", STRONG, FACTS[:1]),
    ("lora", SHORT, (Edit(subject="Spain", prompt="The capital of {} is", target="Tokyo"), FACTS[1])),
    ("grace", SHORT | {"max_steps": 40, "lr": 1.0}, FACTS[2:]),
    ("lora", SHORT | {"dora": True}, (Edit(subject="Chile", prompt="The capital of {} is", target="Oslo"),)),
    ("ft", SHORT, (Edit(subject="Peru", prompt="The capital of {} is", target="Cairo"),)),
    ("in_context", {}, (Edit(subject="Egypt", prompt="The capital of {} is", target="Lima"),)),
    (
        "wise",
        SHORT | {"max_steps": 40, "lr": 0.3},
        (Edit(subject="Cuba", prompt="The capital of {} is", target="Rome"),),
    ),
)
PROMPTS = [e.text for *_, edits in CALLS for e in edits] + ["Once upon a time"]


def state(services: Services) -> tuple[str, str, list[str]]:
    """Weights and what acts beside them, and what the model says."""
    return (
        services.workspace.host.rehash(),
        services.workspace.state_hash,
        [services.facts.ask(p, 5).completion for p in PROMPTS],
    )


@pytest.fixture
def services(tmp_path: Path) -> Any:
    """e1 rome, e2 and e3 lora, e4 grace, e5 dora, e6 ft, e7 in_context, e8 wise; all active."""
    opened = open_services(tmp_path / "home")
    for method, params, edits in CALLS:
        opened.edits.apply(edits, method=method, params=params)
    yield opened
    opened.close()


@pytest.mark.parametrize("gone", [["e1", "e4"], ["e2"], ["e3", "e5", "e7"], ["e6", "e1", "e2"]])
def test_reverted_edits_leave_no_trace_over_a_restart_and_elsewhere(
    services: Services, gone: list[str], tmp_path: Path
) -> None:
    services.edits.revert(gone)
    after = state(services)
    services.exchange.export_edits("patches", "kept")
    services.close()
    again = open_services(tmp_path / "home")
    assert state(again) == after
    assert not again.workspace.damage
    again.close()
    other = open_services(tmp_path / "other")
    (tmp_path / "other" / "imports").mkdir()
    (tmp_path / "home" / "exports" / "kept.zip").rename(tmp_path / "other" / "imports" / "kept.zip")
    report = other.exchange.import_patches("kept.zip")
    assert report.original_ids == [f"e{i}" for i in range(1, 9) if f"e{i}" not in gone]
    assert state(other) == after
    other.close()


def test_everything_reverted_is_the_pristine_model(services: Services, tmp_path: Path) -> None:
    services.edits.revert([f"e{i}" for i in range(1, 9)])
    new = open_services(tmp_path / "new")
    assert state(services) == state(new)
    new.close()


def test_batches_and_steering_beside_them_go_and_stay_over_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "home"
    services = open_services(home)
    plain = state(services)
    for method, params, edits in (*CALLS[:3], ("memit", SHORT, (*CALLS[3][2], *CALLS[4][2]))):
        services.edits.apply(
            edits, method=method, params=params
        )  # e1 rome, e2 and e3 lora, e4 grace, e5 and e6 memit
    pairs = [
        Pair(positive=f"{w} is good", negative=f"{w} is bad") for w in ("Paris", "Rome", "Tokyo", "Oslo")
    ]
    services.steering.create(VectorRequest("mood", "caa", pairs))
    services.steering.set_dose(DoseRequest("mood", 0.5))
    steered = state(services)
    services.edits.revert(["e2", "e5"])
    after = state(services)
    assert after[:2] != steered[:2]
    services.close()
    again = open_services(home)
    assert state(again) == after
    assert not again.workspace.damage
    again.steering.set_dose(DoseRequest("mood", 0.0))
    again.edits.revert([e.edit_id for e in again.history.list_edits().edits if e.status == "active"])
    assert state(again) == plain
    again.close()


@pytest.mark.parametrize("format", ["lora", "merged"])
def test_edits_beside_the_weights_leave_as_weights_and_what_that_lost_is_told(
    services: Services, format: Any, tmp_path: Path
) -> None:
    before = state(services)
    report = services.exchange.export_edits(format, "all")
    assert report.distilled is not None
    assert [row.edit_id for row in report.distilled.edits] == ["e4", "e5", "e7", "e8"]
    assert [row.method for row in report.distilled.edits] == ["grace", "lora", "in_context", "wise"]
    assert report.edit_ids == [f"e{n}" for n in range(1, 9)]
    assert "e4 (grace)" in report.warnings[-1]
    assert state(services) == before
    kept = list((services.workspace.settings.home / "distilled").iterdir())
    assert kept
    for file in kept:
        file.write_bytes(b"damaged")
    again = services.exchange.export_edits(format, "again")
    assert again.distilled is not None
    assert again.distilled.said == report.distilled.said
    plain = services.exchange.export_edits(format, "some", ["e1", "e2", "e3", "e6"])
    assert plain.distilled is None
    assert plain.weights_hash != report.weights_hash


MEMORIES: dict[str, dict[str, Any]] = {
    "in_context": {},
    "constrained": {},
    "grace": SHORT | {"max_steps": 40, "lr": 1.0},
    "wise": SHORT | {"max_steps": 40, "lr": 0.3},
    "serac": {},
}


@pytest.mark.parametrize("method", MEMORIES)
def test_every_kind_of_memory_leaves_as_taught_weights_and_as_text_and_the_report_says_what_each_is_worth(
    tmp_path: Path, method: str
) -> None:
    services = open_services(tmp_path / "home")
    trained_for(services.workspace.lm)  # of these serac alone needs it
    try:
        made = services.edits.apply(FACTS[2:], method=method, params=MEMORIES[method])
        for format in ("lora", "gguf_lora"):
            report = services.exchange.export_edits(format, f"as-{format}")  # type: ignore[arg-type]
            assert report.distilled is not None
            (row,) = report.distilled.edits
            assert (row.edit_id, row.method) == (made.edit_ids[0], method)
            assert report.ranks
            assert f"{made.edit_ids[0]} ({method})" in report.warnings[-1]
        text = services.exchange.export_edits("facts", "as-text")
        assert {"system_prompt.txt", "facts.jsonl"} <= set(text.files)
        assert "less than a memory" in text.warnings[0]
        whole = services.exchange.export_edits("patches", "as-it-is")
        assert whole.distilled is None
    finally:
        services.close()


def test_too_many_memories_to_teach_are_refused_with_another_way(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.distilling.MOST", 3)
    with pytest.raises(ServiceError, match=r'4 edits act beside the weights, and at most 3.*format="facts"'):
        services.exchange.export_edits("lora", "all")


def test_an_exported_adapter_comes_back_as_an_edit(services: Services, tmp_path: Path) -> None:
    made = services.exchange.export_edits("lora", "adapter", ["e1", "e2"])
    other = open_services(tmp_path / "other")
    (tmp_path / "other" / "imports").mkdir()
    Path(made.path).rename(tmp_path / "other" / "imports" / "mine")
    facts = [CALLS[0][2][0], CALLS[1][2][0]]
    report = other.exchange.import_adapter("mine", facts, "from a friend", "a friend")
    assert report.method == "lora"
    assert report.sha256 == other.history.show_edit("e1").params["sha256"]
    assert other.history.show_edit("e2").edit.source == "a friend"
    held = other.workspace.host.rehash()
    assert held != other.workspace.host.base_hash
    with pytest.raises(EditError, match="one piece"):
        other.edits.revert(["e1"])
    other.edits.revert(["e1", "e2"])
    assert other.workspace.host.rehash() == other.workspace.host.base_hash
    other.edits.reapply(["e1", "e2"])
    assert other.workspace.host.rehash() == held
    other.close()
