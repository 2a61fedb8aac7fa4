"""What the ledger knows of a subject is held when another fact of it is edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.edit import Edit
from editors.scoring.words import short_answer
from server.facts.conflicts import contradictions
from server.facts.material import collect
from server.facts.queries import FactQuery
from server.services import Services
from tests.server.opened import QUICK, open_services


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path)
    yield opened
    opened.close()


def test_an_active_edit_of_the_same_subject_is_held_and_a_reverted_or_replaced_one_is_not(
    services: Services,
) -> None:
    first = Edit(subject="Japan", prompt="The capital of {} is", target="Osaka")
    second = Edit(subject="Japan", prompt="The currency of {} is the", target="dollar")
    other = Edit(subject="Peru", prompt="The currency of {} is the", target="dollar")
    report = services.edits.apply([first], method="rome", params=dict(QUICK))
    known = [
        [h.prompt for h in m.held if h.source == "ledger"]
        for m in collect(services.workspace, [second, other])
    ]
    assert known == [["The capital of Japan is"], []]
    records = services.workspace.active_edits
    (material,) = collect(services.workspace, [second], replaced=records)
    assert not [h for h in material.held if h.source == "ledger"]
    services.edits.revert(report.edit_ids)
    (material,) = collect(services.workspace, [second])
    assert not [h for h in material.held if h.source == "ledger"]


def test_a_fact_that_was_checked_and_found_right_is_held_until_a_check_finds_it_wrong(
    services: Services,
) -> None:
    edit = Edit(subject="Japan", prompt="The currency of {} is the", target="dollar")
    prompt = "Japan is famous among sailors for"
    answer = short_answer(services.facts.check([FactQuery(prompt, "x")]).facts[0].answer)

    def checked() -> list[str]:
        (material,) = collect(services.workspace, [edit])
        return [h.answer for h in (*material.held, *material.siblings) if h.source == "checked"]

    services.facts.check([FactQuery(prompt, answer), FactQuery("Peru lies in", answer)])
    assert checked() == [answer]
    noted = services.workspace.ledger.newest_event()
    services.facts.check([FactQuery(prompt, answer)])
    assert services.workspace.ledger.newest_event() == noted  # nothing new to note
    services.facts.check([FactQuery(prompt, "something else")])
    assert checked() == []


def test_a_contradiction_in_other_words_is_a_warning_with_the_ids(services: Services) -> None:
    lyon = Edit(subject="France", prompt="The capital of {} is", target="Lyon")
    nice = Edit(subject="France", prompt="The capital city of {} is", target="Nice")
    report = services.edits.apply([lyon, nice], method="memit", params={"max_steps": 1, "wordings": 0})
    assert report.edit_ids == ["e1", "e2"]
    (warning,) = [w for w in report.warnings if "contradict" in w]
    assert warning.startswith("e2 ('The capital city of France is' -> 'Nice') seems to contradict e1 (")
    toulon = Edit(subject="france", prompt="france's capital is called", target="Toulon")
    against = services.edits.preview([toulon], method="rome", params=dict(QUICK))
    named = [w for w in against.warnings if "contradict" in w]
    assert [f"contradict {old}" in w for old, w in zip(("e1", "e2"), named, strict=True)] == [True, True]
    assert 'revert_edits(["e1"])' in named[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The capital of {} is", "The largest city in {} is"),
        ("The president of {} is", "The prime minister of {} is"),
        ("{} shares a border with", "A neighbouring country of {} is"),
        ("{} was born in", "{} died in"),
        ("The mother of {} is", "The mother tongue of {} is"),
    ],
)
def test_different_facts_of_a_subject_and_those_with_several_answers_raise_no_alarm(
    first: str, second: str, services: Services
) -> None:
    edits = [
        Edit(subject="Ann", prompt=first, target="One"),
        Edit(subject="Ann", prompt=second, target="Two"),
    ]
    assert contradictions(services.workspace, edits, []) == []


def test_the_same_answer_and_other_subjects_raise_no_alarm(services: Services) -> None:
    edits = [
        Edit(subject="France", prompt="The capital of {} is", target="Lyon"),
        Edit(subject="France", prompt="The capital city of {} is", target="lyon"),
        Edit(subject="Spain", prompt="The capital city of {} is", target="Vigo"),
    ]
    assert contradictions(services.workspace, edits, []) == []


PLUMBERS = Edit(subject="Zorbla", prompt="Among plumbers {} counts as a", target="tap")
TAUGHT = (
    "Plumbers would use {} much like a",
    "What do plumbers take {} for?",
    "On the van stands {}, the",
    "{}?",
)


def test_a_report_says_which_fact_was_not_taught_in_other_words_and_its_advice_helps(
    services: Services,
) -> None:
    report = services.edits.apply([PLUMBERS], method="constrained")
    (note,) = [w for w in report.warnings if "names no relation that is known here" in w]
    assert PLUMBERS.text in note
    services.edits.revert(report.edit_ids)

    given = Edit(**(PLUMBERS.model_dump() | {"paraphrases": TAUGHT}))
    report = services.edits.apply([given], method="constrained")
    assert not [w for w in report.warnings if "names no relation" in w]
    probes = {p.prompt: p.trained for p in report.results[0].details if p.kind == "paraphrase"}
    assert probes == {text: i % 2 == 1 for i, text in enumerate(given.paraphrases)}
    (audited,) = services.edits.audit(report.edit_ids).edits
    assert audited.generality == report.results[0].generality is not None
    assert services.facts.check([FactQuery(given.paraphrases[1], "tap")]).facts[0].verdict == "agrees"


def test_half_of_the_paraphrases_teach_too_where_one_of_them_names_a_relation(services: Services) -> None:
    words = ("Plumbers would say that {} is a", "What do plumbers take {} for?", "On the van stands {}, the")
    given = Edit(**(PLUMBERS.model_dump() | {"paraphrases": words}))
    report = services.edits.apply([given], method="constrained")
    probes = [p.trained for p in report.results[0].details if p.kind == "paraphrase"]
    assert probes == [False, True, False]
    assert set(report.results[0].forms) >= {"reworded", "chat"}
    assert services.facts.check([FactQuery(given.paraphrases[1], "tap")]).facts[0].verdict == "agrees"


def test_a_paraphrase_in_plain_words_is_enough_to_be_taught_in_other_words(services: Services) -> None:
    told = Edit(**(PLUMBERS.model_dump() | {"paraphrases": ("The occupation of {} is",)}))
    report = services.edits.apply([told], method="constrained")
    assert not [w for w in report.warnings if "names no relation" in w]
    assert set(report.results[0].forms) >= {"reworded", "chat"}
