from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from store import BadFilter, EditFilter, Ledger
from tests.store.conftest import WHO, Book


def ids(ledger: Ledger, **wanted: str) -> list[str]:
    return [edit.id for edit in ledger.list_edits(EditFilter(**wanted)).edits]  # type: ignore[arg-type]


@pytest.fixture
def full(book: Book) -> Book:
    book.apply("France", reason="the gazette says so")
    book.apply("Côte d'Ivoire", target="Yamoussoukro")
    book.apply("日本の首都", target="東京")
    book.apply("New  Zealand", target="100%_!sure", method="memit")
    book.ledger.record_reverted(["e2"], "w", WHO)
    return book


def test_the_newest_edits_come_first(full: Book) -> None:
    page = full.ledger.list_edits()
    assert [edit.id for edit in page.edits] == ["e4", "e3", "e2", "e1"]
    assert (page.total, page.next_cursor) == (4, None)


def test_filters_narrow_the_list_together(full: Book) -> None:
    assert ids(full.ledger, status="reverted") == ["e2"]
    assert ids(full.ledger, method="memit") == ["e4"]
    assert ids(full.ledger, subject=" new zealand ") == ["e4"]
    assert ids(full.ledger, subject="new") == []
    assert ids(full.ledger, status="active", text="capital") == ["e4", "e3", "e1"]
    assert [e.id for e in full.ledger.active_edits(full.model)] == ["e1", "e3", "e4"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("france", ["e1"]),
        ("fran", ["e1"]),
        ("gazette", ["e1"]),
        ("capital france", ["e1"]),
        ("cote ivoire", ["e2"]),
        ("d'Ivoire", ["e2"]),
        ("東京", ["e3"]),
        ("首都", ["e3"]),
        ("100%", ["e4"]),
        ("%_!", ["e4"]),
        ("%", ["e4"]),
        ("rance", ["e1"]),
        ("nowhere", []),
    ],
)
def test_text_is_found_by_words_beginnings_and_else_anywhere(full: Book, text: str, found: list[str]) -> None:
    assert ids(full.ledger, text=text) == found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=()), max_size=60))
@example('"')
@example("NEAR(a b) AND OR NOT ^ * ( ) { } : -subject:")
@example("\x00")
@example("\ud800")
def test_no_text_is_a_syntax_error(full: Book, text: str) -> None:
    assert full.ledger.list_edits(EditFilter(text=text)).total <= 4


def test_pages_follow_one_another_even_while_edits_are_added(full: Book) -> None:
    seen, cursor = [], None
    while True:
        page = full.ledger.list_edits(EditFilter(text="capital"), limit=1, cursor=cursor)
        seen += [edit.id for edit in page.edits]
        full.apply("Atlantis")
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ["e4", "e3", "e2", "e1"]


@pytest.mark.parametrize("cursor", ["", "x", "e30=", "WzEsMl0=", "ÿ", "W10=", "\ud800"])
def test_a_cursor_from_elsewhere_is_refused(full: Book, cursor: str) -> None:
    with pytest.raises(BadFilter, match="cursor"):
        full.ledger.list_edits(cursor=cursor)


def test_a_cursor_of_another_search_is_refused(full: Book) -> None:
    cursor = full.ledger.list_edits(limit=1).next_cursor
    with pytest.raises(BadFilter, match="other filters"):
        full.ledger.list_edits(EditFilter(status="active"), cursor=cursor)


def test_since_takes_dates_and_times_with_and_without_zone(full: Book) -> None:
    for since in ("2020-01-01", "2020-01-01T00:00:00", "2020-01-01T00:00:00Z", "2020-01-01T00:00:00.5+02:00"):
        assert len(ids(full.ledger, since=since)) == 4
    assert ids(full.ledger, since="2999-01-01") == []
    assert ids(full.ledger, since=full.ledger.get_edit("e3").created) == ["e4", "e3"]
    for wrong in ("yesterday", "", "2020-13-01", "0001-01-01T00:00:00+23:00"):
        with pytest.raises(BadFilter, match="since"):
            ids(full.ledger, since=wrong)


def test_wrong_filters_name_the_value_and_the_choices(full: Book) -> None:
    with pytest.raises(BadFilter, match=r"'done'.*active, reverted"):
        ids(full.ledger, status="done")
    for limit in (0, -1, 201):
        with pytest.raises(BadFilter, match=f"{limit}.*200"):
            full.ledger.list_edits(limit=limit)
    with pytest.raises(BadFilter, match="1,001"):
        ids(full.ledger, text="x" * 1001)


def test_the_last_event_of_a_kind_is_found_by_its_payload_whole_however_long_it_is(book: Book) -> None:
    book.apply("France")
    maps = ["x" * 9_000]
    first = book.ledger.record_event("located", {"fact": "a", "maps": maps}, model_id=book.model)
    second = book.ledger.record_event("located", {"fact": "a"}, model_id=book.model)
    book.ledger.record_event("located", {"fact": "b"}, model_id=book.model)
    found = book.ledger.last_event("located", {"fact": "a"}, before=second)
    assert found is not None
    assert (found.seq, found.payload["maps"]) == (first, maps)
    latest = book.ledger.last_event("located", {"fact": "a"}, model_id=book.model)
    assert latest is not None
    assert latest.seq == second
    assert book.ledger.last_event("located", {"fact": "a"}, model_id=book.model + 1) is None
    assert book.ledger.last_event("found", {"fact": "a"}) is None
