"""Views and pages for people: facts, history, damage, and what needs attention first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from store import BadFilter, Ledger
from store.overview import FactFilter, Overview
from tests.conftest import ROOT
from tests.many_edits import fill
from tests.store.conftest import WHO, Book

GOOD = {"reliability": 1.0, "before": "Lyon", "after": "Rome", "forms": {"chat": 1.0}, "locality": 1.0}


def ids(overview: Overview, **wanted: object) -> list[str]:
    return [fact["edit_id"] for fact in overview.page(FactFilter(**wanted)).facts]  # type: ignore[arg-type]


def test_the_view_facts_says_what_was_said_and_whether_it_holds(book: Book) -> None:
    lost = {
        "kind": "sibling",
        "prompt": "Paris is in",
        "expected": "Europe",
        "before": "Europe",
        "after": "x",
    }
    weak = GOOD | {"forms": {"chat": 0.25}, "details": [lost | {"held": False}, lost | {"held": True}]}
    book.apply("France", measurements=[GOOD], reason="a law", source="https://example.org")
    book.apply("Peru", measurements=[weak])
    book.ledger.record_measurements({"e1": GOOD | {"reliability": 0.0, "after": "Nice"}}, "audit", None, WHO)
    sql = "SELECT edit_id, holds, said_before, right_answer, says_now, source, client FROM facts ORDER BY edit_id"
    assert book.ledger.query(sql).rows == [
        ["e1", "no", "Lyon", "Rome", "Nice", "https://example.org", "test-client"],
        ["e2", "partly", "Lyon", "Rome", "Rome", None, "test-client"],
    ]
    damage = book.ledger.query("SELECT edit_id, kind, prompt, said_before, said_after, kl FROM damage").rows
    assert damage == [["e2", "sibling", "Paris is in", "Europe", "x", 0.01]]
    history = book.ledger.query("SELECT what, edit_id FROM history WHERE edit_id = 'e1' ORDER BY seq").rows
    assert history == [["applied", "e1"], ["measured", "e1"]]
    assert book.ledger.verify() == []


def test_an_audit_of_the_prompt_alone_does_not_make_a_weak_correction_hold(book: Book) -> None:
    book.apply(
        "France", measurements=[GOOD | {"forms": {"chat": 0.0, "reworded": 0.25}, "subject_locality": 0.75}]
    )
    said = {"reliability": 1.0, "after": "Rome", "forms": {}, "locality": 1.0}
    book.ledger.record_measurements({"e1": said}, "audit", None, WHO)
    sql = "SELECT holds, statement, reworded, chat, other_facts FROM facts"
    assert book.ledger.query(sql).rows == [["partly", 1.0, 0.25, 0.0, 0.75]]
    chat = said | {"forms": {"chat": 1.0}, "subject_locality": 1.0}
    book.ledger.record_measurements({"e1": chat}, "audit", None, WHO)
    assert book.ledger.query(sql).rows == [["partly", 1.0, 0.25, 1.0, 1.0]]
    book.ledger.record_measurements({"e1": said | {"forms": {"reworded": 1.0}}}, "audit", None, WHO)
    assert book.ledger.query(sql).rows == [["yes", 1.0, 1.0, 1.0, 1.0]]


def test_the_schema_explains_the_views(ledger: Ledger) -> None:
    assert "CREATE VIEW facts AS -- every correction" in ledger.schema()


def test_what_needs_attention_comes_first_and_changes_are_followed(book: Book) -> None:
    overview = Overview(book.ledger)
    assert overview.page(FactFilter()).total == 0
    book.apply("France", measurements=[GOOD])
    book.apply("Peru", measurements=[GOOD | {"reliability": 0.0}])
    book.apply("Chad", measurements=[GOOD | {"subject_locality": 0.2}])
    book.ledger.record_rejected(book.patch("Italy"), ["min_reliability"], WHO)
    assert ids(overview) == ["e2", "e3", "e4", "e1"]
    book.ledger.record_reverted(["e2"], "w", WHO)
    assert ids(overview) == ["e3", "e4", "e1", "e2"]
    book.apply("Italy", measurements=[GOOD])  # the rejected attempt has an answer now
    assert ids(overview) == ["e3", "e5", "e1", "e4", "e2"]
    assert overview.counts() == {"partly": 1, "yes": 2, "rejected": 1, "reverted": 1, "all": 5}
    overview.close()
    assert ids(overview, status="rejected") == ["e4"]


def test_filters_and_search_combine(book: Book) -> None:
    overview = Overview(book.ledger)
    book.apply("France", "Peru")
    book.apply("France", method="memit", target="Nice")
    assert ids(overview, text="fra") == ["e3", "e1"]
    assert ids(overview, text="fra", method="memit") == ["e3"]
    assert ids(overview, batch=1) == ["e2", "e1"]
    assert ids(overview, subject="france", batch=1) == ["e1"]
    assert ids(overview, text="'; DROP TABLE edits; --") == []
    assert overview.methods() == ["memit", "rome"]


def test_facts_are_filtered_by_the_set_that_they_were_corrected_for_or_stand_in(book: Book) -> None:
    overview = Overview(book.ledger)
    book.apply("France", "Peru", "Chad")
    [request, *_] = book.patch("France").requests
    listed = {name: request[name] for name in ("subject", "prompt")} | {"answer": "Rome"}
    book.ledger.save_facts("capitals", 1, {}, {1: listed, 2: listed | {"subject": "Fiji"}})
    book.ledger.put_fact_states("capitals", 1, {2: {"edit_id": "e3"}})
    book.ledger.save_facts("others", 1, {}, {1: listed | {"subject": "Mali"}})
    assert ids(overview, fact_set="capitals") == ["e3", "e1"]
    assert ids(overview, fact_set="capitals", text="fra") == ["e1"]
    assert ids(overview, fact_set="others") == ids(overview, fact_set="'; --") == []
    assert overview.fact_sets() == ["capitals", "others"]


@pytest.mark.parametrize("wanted", [{"status": "gone"}, {"holds": "maybe"}, {"since": "soon"}])
def test_a_filter_that_cannot_be_used_is_named(book: Book, wanted: dict[str, str]) -> None:
    with pytest.raises(BadFilter, match=next(iter(wanted.values()))):
        Overview(book.ledger).page(FactFilter(**wanted))  # type: ignore[arg-type]


def work(overview: Overview, wanted: FactFilter, page: int = 1) -> int:
    """Thousands of steps that SQLite's machine takes for a page."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    assert overview._conn is not None
    overview._conn.set_progress_handler(count, 1_000)
    assert overview.page(wanted, page=page).facts
    overview._conn.set_progress_handler(None, 0)
    return steps


def test_a_page_of_ten_thousand_edits_costs_little_more_than_one_of_a_thousand(tmp_path: Path) -> None:
    """In steps of SQLite's machine; `python -m benchmarks.board` measures the times."""
    asked = (
        (FactFilter(), 1),
        (FactFilter(), 30),
        (FactFilter(text="country 77"), 1),
        (FactFilter(holds="no"), 1),
    )
    found = {}
    for edits in (1_000, 10_000):
        with Ledger.open(fill(tmp_path / str(edits), edits)) as ledger:
            overview = Overview(ledger)
            assert overview.page(FactFilter()).total == edits
            found[edits] = [work(overview, wanted, page) for wanted, page in asked]
            overview.close()
    for few, many in zip(found[1_000], found[10_000], strict=True):
        assert many < few + 400, found


def test_the_metadata_for_datasette_names_what_there_is_and_its_queries_run(tmp_path: Path) -> None:
    metadata = json.loads((ROOT / "store" / "datasette.json").read_text("utf-8"))["databases"]["ledger"]
    with Ledger.open(fill(tmp_path, 40, 20)) as ledger:
        rows = ledger.query("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')", limit=500).rows
        there = {name for (name,) in rows if not name.startswith(("sqlite_", "edits_fts_"))}
        assert set(metadata["tables"]) - {"sqlite_sequence"} == there
        for name, about in metadata["tables"].items():
            named = {
                *about.get("columns", ()),
                *about.get("facets", ()),
                *filter(None, [about.get("sort_desc")]),
            }
            columns = ledger.query(f"SELECT * FROM {name} LIMIT 1").columns
            assert named <= set(columns), name
        for query in metadata["queries"].values():
            assert ledger.query(query["sql"]).columns


ASKED = {"reliability": 1.0, "after": "Rome", "locality": 1.0}
ALL_FORMS = ("statement", "reworded", "chat", "chat_reworded", "language")


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("asked_later", [[], ["chat"], ["reworded"], [f for f in ALL_FORMS if f != "chat"]])
def test_a_correction_that_fails_in_any_form_holds_in_part_until_that_form_holds(
    book: Book, form: str, asked_later: list[str]
) -> None:
    book.apply("France", measurements=[GOOD | {"forms": dict.fromkeys(ALL_FORMS, 1.0) | {form: 0.0}}])
    later = dict.fromkeys([each for each in asked_later if each != form], 1.0)
    book.ledger.record_measurements({"e1": ASKED | {"forms": later}}, "audit", None, WHO)
    assert book.ledger.query("SELECT holds FROM facts").rows == [["partly"]]
    book.ledger.record_measurements({"e1": ASKED | {"forms": {form: 1.0}}}, "audit", None, WHO)
    assert book.ledger.query("SELECT holds FROM facts").rows == [["yes"]]


def test_what_a_fact_said_first_stays_through_every_correction_of_it(book: Book) -> None:
    book.apply("France", measurements=[GOOD])
    for i, (before, now) in enumerate(
        [("Rome", "Bonn"), ("Bonn", "Oslo")], 1
    ):  # as ledgers before 0.2 have it
        patch = book.patch("France", target=now, measurements=[GOOD | {"before": before, "after": now}])
        book.ledger.record_patches([patch], WHO, replaced=[f"e{i}"])
    book.apply("Peru", measurements=[GOOD | {"before": "Quito"}])
    rows = book.ledger.query("SELECT edit_id, said_before, says_now FROM facts ORDER BY edit_id").rows
    assert rows == [
        ["e1", "Lyon", None],
        ["e2", "Lyon", None],
        ["e3", "Lyon", "Oslo"],
        ["e4", "Quito", "Rome"],
    ]
