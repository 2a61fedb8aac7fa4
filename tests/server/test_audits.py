"""An audit asks what it does not know: nothing twice in one state, the pristine model once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.model.lm import LM
from server.facts import auditing, measuring
from server.facts.condensed import _filled
from server.jobs import audits
from server.request_context import RequestContext
from server.services import Services
from tests.server.opened import FACTS, apply, open_services

FRANCE, JAPAN, SPAIN = FACTS


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


@pytest.fixture
def asked(services: Services, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Every prompt that is put to the model, with whether it was to the pristine one."""
    return _asked(services, monkeypatch)


def _asked(services: Services, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    seen: list[tuple[bool, str]] = []
    host, generate = services.workspace.host, LM.generate

    def noted(lm: LM, prompts: Sequence[Any], *given: Any, **named: Any) -> Any:
        pristine = host.rehash() == host.base_hash
        seen.extend((pristine, prompt.text) for prompt in prompts)
        return generate(lm, prompts, *given, **named)

    monkeypatch.setattr(LM, "generate", noted)
    return seen


def test_a_second_audit_in_the_same_state_asks_nothing_and_says_the_same(
    services: Services, asked: list[tuple[bool, str]]
) -> None:
    for edit in FACTS:
        apply(services, edit)
    first = services.edits.audit()
    asked.clear()
    second = services.edits.audit()
    assert asked == []
    assert (first.measured_now, second.measured_now) == (3, 0)
    same = {"seconds", "measured_now"}
    assert second.model_dump(exclude=same) == first.model_dump(exclude=same)
    assert [m.occasion for m in services.history.show_edit("e1").measurements] == ["apply", "audit"]


def test_more_edits_than_answers_are_kept_of_are_audited_all_the_same(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "MOST_KEPT", 1)
    monkeypatch.setattr(measuring, "MOST_JUDGED", 1)
    for edit in FACTS:
        apply(services, edit)
    audited = services.edits.audit()
    assert len(audited.edits) == len(FACTS)
    edits, materials = measuring.judged_by(services.workspace, FACTS)
    assert [edit.text for edit in edits] == [edit.text for edit in FACTS]
    assert len(materials) == len(FACTS)


def test_after_another_edit_the_live_model_is_asked_and_the_pristine_one_only_about_it(
    services: Services, asked: list[tuple[bool, str]]
) -> None:
    apply(services, FRANCE)
    services.edits.audit()
    apply(services, JAPAN)
    asked.clear()
    audit = services.edits.audit()
    assert audit.measured_now == 2
    assert not any(pristine and text == FRANCE.text for pristine, text in asked)
    assert any(pristine and text == JAPAN.text for pristine, text in asked)
    assert any(not pristine and text == FRANCE.text for pristine, text in asked)


def test_what_is_known_in_part_is_asked_in_part(services: Services, asked: list[tuple[bool, str]]) -> None:
    for edit in FACTS:
        apply(services, edit)
    services.edits.audit(["e3"])
    asked.clear()
    audit = services.edits.audit(["e1", "e3"])
    assert audit.measured_now == 1
    assert [e.edit_id for e in audit.edits] == ["e1", "e3"]
    assert not any(text == SPAIN.text for _, text in asked)


PROBABILITIES = ("p_target_before", "p_target_after")


def _settled(audit: Any) -> dict[str, Any]:
    """An audit without its times, and without probabilities, whose last digits depend on what is asked together."""
    told: dict[str, Any] = audit.model_dump(exclude={"seconds", "measured_now"})
    told["edits"] = [{k: v for k, v in each.items() if k not in PROBABILITIES} for each in told["edits"]]
    return told


def _probabilities(edit: Any) -> list[float]:
    return [getattr(edit, name) for name in PROBABILITIES]


def test_an_incremental_audit_is_that_of_a_server_that_knows_nothing(
    services: Services, tmp_path: Path
) -> None:
    for edit in FACTS:
        apply(services, edit)
        services.edits.audit()
    services.edits.revert(["e2"])
    known = services.edits.audit()
    services.close()
    fresh = open_services(tmp_path / "home", bounds="off")
    anew = fresh.edits.audit()
    assert _settled(known) == _settled(anew)
    for was, now in zip(known.edits, anew.edits, strict=True):
        assert _probabilities(now) == pytest.approx(_probabilities(was), rel=1e-5)
    fresh.close()


def test_after_a_restart_the_unedited_model_is_asked_only_what_the_ledger_does_not_have(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(services, FRANCE)  # beside nothing: the answers before it are those of the unedited model
    apply(services, JAPAN)
    services.edits.audit(["e2"])
    apply(services, SPAIN)
    services.close()
    fresh = open_services(tmp_path / "home", bounds="off")
    with monkeypatch.context() as patched:
        asked = _asked(fresh, patched)
        known = fresh.edits.audit()
    pristine = {text for was_pristine, text in asked if was_pristine}
    assert SPAIN.text in pristine
    assert not pristine & {FRANCE.text, JAPAN.text}
    fresh.close()
    monkeypatch.setattr(auditing, "recorded_answers", lambda _, records, __: [None] * len(records))
    anew = open_services(tmp_path / "home", bounds="off")
    all_asked = anew.edits.audit()
    anew.close()
    assert _settled(known) == _settled(all_asked)
    for one, other in zip(known.edits, all_asked.edits, strict=True):
        assert _probabilities(one) == pytest.approx(_probabilities(other), rel=1e-5)


def test_weights_that_are_not_those_of_the_ledger_are_always_asked(services: Services) -> None:
    apply(services, FRANCE)
    services.edits.audit()
    name = services.workspace.host.changed_tensors()[0]
    with torch.no_grad():
        services.workspace.lm.model.get_parameter(name).add_(0.5)
    audit = services.edits.audit()
    assert not audit.integrity.weights
    assert audit.measured_now == 1
    assert services.edits.audit().measured_now == 1, "what damaged weights say is not kept"
    assert services.edits.audit(repair=True).measured_now == 0, "repaired, they are those that were measured"


def test_the_same_edits_in_the_same_state_are_not_asked_about_twice_before_an_edit(
    services: Services, asked: list[tuple[bool, str]]
) -> None:
    quick = {"max_steps": 1, "contexts": 1}
    services.edits.preview([FRANCE], "memit", quick)
    first = len(asked)
    asked.clear()
    services.edits.preview([FRANCE], "memit", quick | {"max_steps": 2})
    assert len(asked) < first, "the answers before are known"
    other = len(asked)
    asked.clear()
    apply(services, JAPAN)
    asked.clear()
    services.edits.preview([FRANCE], "memit", quick)
    assert len(asked) > other, "in another state they are not"


def test_forms_and_other_facts_are_asked_only_when_that_is_wanted(
    services: Services, asked: list[tuple[bool, str]]
) -> None:
    apply(services, FRANCE)
    asked.clear()
    short = services.edits.audit()
    few = len(asked)
    asked.clear()
    full = services.edits.audit(full=True)
    assert {probe.kind for probe in short.edits[0].details} <= {"paraphrase", "neighbour"}
    assert few <= 2 * (1 + len(FRANCE.paraphrases) + len(FRANCE.neighbours)) < len(asked)
    assert set(full.forms) > set(short.forms)


def test_beside_memories_alone_only_what_they_claim_is_asked_of_the_live_model(
    services: Services, asked: list[tuple[bool, str]]
) -> None:
    services.edits.apply([FRANCE, JAPAN], method="in_context")
    asked.clear()
    audit = services.edits.audit()
    texts = [text for _, text in asked]
    neighbours = [p.prompt for e in audit.edits for p in e.details if p.kind == "neighbour"]
    assert neighbours
    assert not set(texts) & set(neighbours), "the ledger has what the unedited model says"
    apply(services, SPAIN)
    asked.clear()
    services.edits.audit()
    assert all(any(prompt in text for _, text in asked) for prompt in neighbours)


def test_an_audit_of_many_edits_is_a_job_whose_result_is_that_of_a_call(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [FRANCE.model_copy(update={"subject": f"Town {i}"}) for i in range(5)]
    services.edits.apply(edits, method="in_context")
    monkeypatch.setattr(audits, "AT_ONCE", 4)
    monkeypatch.setattr(audits, "CHUNK", 2)
    started = services.jobs.audit()
    assert started is not None
    assert started.job_id in started.next
    record = asyncio.run(services.jobs.wait(started.job_id, 60, RequestContext()))
    assert record.state == "done", record.message
    assert record.result is not None
    assert services.jobs.audit() is None, "everything was asked in this state"
    called = services.edits.audit()
    assert called.measured_now == 0
    assert record.result["summary"] == called.summary
    assert record.result["holding"] == called.holding
    occasions = [m.occasion for m in services.history.show_edit("e1").measurements]
    assert occasions == ["apply", "audit"]


def test_what_is_zero_is_no_empty_value_and_is_shown() -> None:
    values = {"reliability": 0.0, "layer": 0, "held": False, "text": "", "forms": {}, "none": None, "p": 0.5}
    assert _filled(values) == {"reliability": 0.0, "layer": 0, "p": 0.5}
