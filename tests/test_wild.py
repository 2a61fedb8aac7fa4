"""The benchmark in the wild: its facts, its wordings that nothing learns, its shards and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

import editors
from benchmarks.wild.__main__ import call_of, read_options
from benchmarks.wild.asking import is_right, known_before, rates
from benchmarks.wild.facts import FORMS, Asked, drawn, load, wordings
from benchmarks.wild.run import Call, units
from benchmarks.wild.table import table
from server.facts.guard import Guard

WILD = load()


def test_there_are_a_hundred_facts_of_many_relations_with_every_form() -> None:
    assert len(WILD.facts) >= 100
    assert len({fact.relation for fact in WILD.facts}) >= 20
    for fact in WILD.facts:
        assert all(fact.forms[form] for form in FORMS)
        assert {a.chat for a in fact.siblings} == {True, False}
        assert len(fact.neighbours) >= 4
        assert all(fact.edit.subject.casefold() in a.prompt.casefold() for a in fact.forms["reworded"])


def test_no_target_is_a_right_answer_and_no_neighbour_is_ever_edited() -> None:
    edited = {fact.edit.subject for fact in WILD.facts}
    for fact in WILD.facts:
        (language,) = fact.forms["language"]
        assert fact.edit.target not in language.before
        assert not any(subject in a.prompt.split() for a in fact.neighbours for subject in edited)


def test_no_wording_of_the_benchmark_is_in_the_data_that_methods_learn_from() -> None:
    folder = Path(editors.__file__).parent / "data"
    learned = " ".join(p.read_text("utf-8") for p in folder.rglob("*") if p.is_file()).casefold()
    assert [w for w in wordings() if w.casefold() in learned] == []


def test_shards_divide_the_work_and_the_same_seed_draws_the_same_facts() -> None:
    work = units(["rome", "memit"], WILD.facts, "single", 1, 10, 3)
    assert len(work) == 20
    parts = [unit for i in range(7) for unit in work[i::7]]
    assert sorted(map(repr, parts)) == sorted(map(repr, work))
    assert drawn(WILD.facts, 10, 3) == drawn(WILD.facts, 10, 3) != drawn(WILD.facts, 10, 4)


def test_a_form_counts_by_its_wordings_and_a_sibling_only_where_it_was_known() -> None:
    fact = WILD.facts[0]
    wrong = {(a.prompt, a.chat): "nothing of the kind" for a in fact.asked}
    before = wrong | {(a.prompt, a.chat): a.right[0] for a in fact.siblings if not a.chat}
    after = before | {(a.prompt, a.chat): a.right[0] for a in fact.forms["reworded"][:1]}
    found = rates(fact, before, after)
    assert found["reworded"] == 0.5
    assert found["siblings statement"] == 1.0
    assert found["siblings chat"] is None
    assert found["language"] is None
    assert rates(fact, before, wrong)["siblings statement"] == 0.0


def test_a_question_counts_where_the_model_was_right_before() -> None:
    asked = [Asked("What is two plus three?", True, ("5", "five")), Asked("Two plus two is", False, ("4",))]
    answers = {("What is two plus three?", True): "It is five.", ("Two plus two is", False): "44"}
    assert [is_right(a, answers) for a in asked] == [True, False]
    assert known_before(asked, answers) == asked[:1]


def test_the_table_has_a_column_for_each_method_and_an_interval_over_facts() -> None:
    records = [
        {"method": m, "rates": {"statement": v, "language": None, "perplexity ratio": 1.01}}
        for m, v in (("rome", 1.0), ("rome", 0.0), ("memit", 1.0))
    ]
    text = table(records, "about")
    assert "| | rome | memit |" in text
    assert "| says it: the statement | 0.50 [0.00–1.00] | 1.00 [1.00–1.00] |" in text
    assert "1.0100 |" in text


def test_bounds_on_the_command_line_are_those_of_apply_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["wild", "--methods", "rome", "--guard", '{"off": ["subject_locality"]}'])
    assert call_of(read_options()) == Call("single", {"guard": Guard(off=("subject_locality",))})
