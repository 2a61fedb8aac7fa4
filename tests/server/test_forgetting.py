"""A fact is forgotten: the old answer is gone from every wording asked, or nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import ServiceError
from server.facts.queries import Forget
from server.services import Services
from tests.server.opened import FACTS, apply, open_services, same, weights

PROMPT = "The capital of {} is"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


def test_what_is_suppressed_is_not_said_and_comes_back_with_a_revert(services: Services) -> None:
    apply(services, FACTS[2])
    said = services.facts.ask("The capital of France is", 6).completion
    state, live = services.workspace.state_hash, weights(services)
    report = services.edits.forget([Forget("France", PROMPT)], reason="asked for", source="them", max_said=1)
    [fact] = report.facts
    assert (report.status, fact.suppressed or fact.said_after is not None) == ("suppressed", True)
    assert fact.answer in said
    assert fact.answer not in fact.after
    assert fact.edit_id == report.edit_ids[0]
    assert fact.said_with_hint is not None
    assert report.hidden == bool(report.note)
    shown = services.history.show_edit(report.edit_ids[0])
    assert (shown.edit.previous, shown.edit.target, shown.edit.reason) == (
        fact.answer,
        "not known",
        "asked for",
    )
    services.edits.revert(report.edit_ids)
    assert services.workspace.state_hash == state
    assert same(weights(services), live)
    assert services.facts.ask("The capital of France is", 6).completion == said


def test_where_the_answer_is_still_said_nothing_changes(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.facts.forgetting as forgetting

    monkeypatch.setattr(forgetting, "_has", lambda text, edit: True)
    state, live = services.workspace.state_hash, weights(services)
    report = services.edits.forget([Forget("France", PROMPT)])
    assert report.status == "rejected"
    assert report.edit_ids == []
    assert any("is still answered with" in failure for failure in report.failed)
    assert not report.facts[0].suppressed
    assert services.workspace.state_hash == state
    assert same(weights(services), live)
    assert services.history.list_edits(status="active").total == 0


def test_a_subject_that_the_prompt_does_not_have_is_named_by_its_place(services: Services) -> None:
    with pytest.raises(ServiceError, match=r"facts\[1\]: .*does not contain the subject 'Spain'"):
        services.edits.forget([Forget("France", PROMPT), Forget("Spain", "The capital of France is")])
    assert services.history.list_edits().total == 0


def test_the_neutral_continuation_must_not_say_the_answer(services: Services) -> None:
    with pytest.raises(ServiceError, match=r"facts\[0\]\.instead"):
        services.edits.forget([Forget("France", PROMPT, answer="Paris", instead="no longer Paris")])
    assert services.history.list_edits().total == 0
