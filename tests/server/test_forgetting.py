"""A fact is forgotten: the old answer is gone from every wording asked, or nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit, is_question
from editors.memory.relation_judge import RelationJudge
from editors.scoring.words import tidy
from server.errors import ServiceError
from server.facts import forgetting, forgetting_report
from server.facts.giving_away import questions_about
from server.facts.guard import Guard
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


def test_of_a_corrected_fact_the_corrections_answer_is_forgotten_and_named_as_what_was_said(
    services: Services,
) -> None:
    original = services.facts.ask("The capital of France is", 6).completion.strip()
    taught = FACTS[0].model_copy(update={"target": "Rome"})
    services.edits.apply([taught], method="grace", guard=Guard(off=("all",)))
    said = services.facts.ask("The capital of France is", 6).completion.strip()
    assert said[:4] == "Rome" != original[:4]
    [fact] = services.edits.forget([Forget("France", PROMPT)], max_said=1).facts
    assert fact.before == said
    assert said.startswith(fact.answer)
    sql = "SELECT DISTINCT said_before FROM facts WHERE prompt = 'The capital of France is'"
    assert services.history.query(sql).rows == [[original]]


def test_where_the_answer_is_still_said_nothing_changes(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (forgetting, forgetting_report):
        monkeypatch.setattr(module, "still_has", lambda text, edit: True)
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


@pytest.fixture
def giving_away(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The model says Paris in one wording that was not learned, whatever it really says; the wording."""
    really, wording = forgetting._said, set[str]()

    def said(workspace: Any, asked: Any, known: Any = ()) -> Any:
        answers = really(workspace, asked, known)
        wording.add(list(asked[0].wordings)[2])
        return [each | dict.fromkeys(wording, "It is Paris.") for each in answers]

    monkeypatch.setattr(forgetting, "_said", said)
    return wording


def test_a_wording_that_still_says_it_is_named_and_the_advice_can_be_taken(
    services: Services, giving_away: set[str]
) -> None:
    wish = Forget("France", PROMPT, answer="Paris")
    report = services.edits.forget([wish])
    [fact] = report.facts
    assert report.status == "rejected"
    [wording] = giving_away
    assert [(each.prompt, each.answer) for each in fact.still_said] == [(wording, "It is Paris.")]
    assert any(repr(wording) in failure for failure in report.failed)
    assert report.summary.startswith("0 of 1 fact not said in any of")
    [advised] = re.findall(r"max_said=([\d.]+)", report.next)
    kept = services.edits.forget([wish], max_said=float(advised))
    assert kept.status == "partly", "it is kept, and not claimed to be suppressed"
    assert kept.facts[0].suppressed is False
    assert kept.summary == report.summary
    services.edits.revert(kept.edit_ids)


def test_what_could_not_be_asked_in_other_words_is_not_called_suppressed(services: Services) -> None:
    wish = Forget("zorbium", "Why does zorbium glow?", answer="Paris")
    report = services.edits.forget([wish])
    [fact] = report.facts
    assert (report.status, fact.suppressed, fact.asked, fact.said_after) == ("partly", None, 0, None)
    assert "its own words alone" in report.summary


def test_a_memory_that_would_silence_other_things_is_not_kept(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RelationJudge, "asks", lambda *_: 0.0)
    report = services.edits.forget([Forget("France", PROMPT, answer="Paris")])
    assert report.status == "rejected"
    assert report.facts[0].silenced
    assert any("silence" in failure for failure in report.failed)
    [goal] = re.findall(r'goal="(\w+)" tries the weights', report.next)
    again = services.edits.forget([Forget("France", PROMPT, answer="Paris")], goal, max_said=1)
    assert again.status != "rejected", again.failed
    assert not again.hidden
    assert not again.facts[0].silenced
    services.edits.revert(again.edit_ids)


def test_kindred_questions_that_give_it_away_are_closed_with_it(services: Services) -> None:
    questions = questions_about(Edit(subject="Big Ben", prompt="{} is located in the city of", target="x"))
    leak = questions.kin[0].statement.text
    said = services.facts.ask(leak, 6, chat=is_question(leak)).completion
    words = [word for word in re.findall(r"[A-Za-z]{2,}", said) if len(tidy(word)) > 1]
    report = services.edits.forget(
        [Forget("Big Ben", "{} is located in the city of", answer=words[0])], max_said=1
    )
    [fact] = report.facts
    assert report.status != "rejected", report.failed
    assert fact.also_edited
    assert report.edit_ids == [fact.edit_id, *fact.also_edited]
    assert services.facts.ask(leak, 6, chat=is_question(leak)).completion.strip().startswith("not known")
    services.edits.revert(report.edit_ids)
    assert services.facts.ask(leak, 6, chat=is_question(leak)).completion == said


def test_a_question_that_two_facts_would_close_is_closed_once(services: Services) -> None:
    prompts = ["{} is located in the city of", "{} is located in the country of"]
    report = services.edits.forget([Forget("Big Ben", prompt, answer="e") for prompt in prompts], max_said=1)
    closed = [edit for fact in report.facts for edit in fact.also_edited]
    assert len(set(closed)) == len(closed)


def test_beside_a_memory_nothing_is_trained_to_see_whether_it_comes_back(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "_after_relearning", lambda *_: pytest.fail("trained"))
    report = services.edits.forget([Forget("France", PROMPT)], max_said=1)
    assert report.hidden
    assert report.facts[0].said_after_relearning is None


def test_in_the_weights_a_little_relearning_is_tried(services: Services) -> None:
    state = services.workspace.state_hash
    report = services.edits.forget([Forget("Spain", PROMPT, answer="Paris")], goal="export", max_said=1)
    [fact] = report.facts
    assert report.status != "rejected", report.failed
    assert not report.hidden
    assert fact.said_after_relearning is not None
    services.edits.revert(report.edit_ids)
    assert services.workspace.state_hash == state
