"""Tampering by hand is found, by name."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from store import DamagedLedger, Ledger, Problem
from tests.store.conftest import WHO, Book


@pytest.fixture
def written(home: Path) -> Path:
    with Ledger.open(home) as ledger:
        book = Book(ledger)
        book.apply("France")
        book.apply("Italy", "Peru")
        book.apply("Chad")
        ledger.record_reverted(["e2"], "w", WHO, restack={2: b"Peru alone"})
        ledger.record_measurements({"e1": {"reliability": 0.5}}, "audit", {"kl": 0.2}, WHO)
        assert ledger.verify() == []
    return home


def tamper(home: Path, *statements: str) -> list[Problem]:
    """Change the database behind the ledger's back, then ask what is wrong, reading only."""
    conn = sqlite3.connect(home / "ledger.db", isolation_level=None)
    for statement in statements:
        conn.execute(statement)
    conn.close()
    with Ledger.open(home, read_only=True) as ledger:
        ledger.list_edits(limit=200)  # a damaged row does not keep the rest from being read
        for model_id in (1, 2):
            ledger.stack(model_id)
        for edit_id in ("e1", "e2", "e3", "e4"):
            ledger.events_of(edit_id)
            ledger.measurements_of(edit_id)
        return ledger.verify()


UNGUARDED = ("DROP TRIGGER events_no_update", "DROP TRIGGER events_no_delete")


@pytest.mark.parametrize(
    ("statement", "where", "says"),
    [
        ("UPDATE edits SET target = 'Oslo' WHERE id = 'e3'", "e3", "'Oslo'"),
        ("UPDATE edits SET request = '{}' WHERE id = 'e3'", "e3", "request"),
        ("UPDATE edits SET status = 'active' WHERE id = 'e2'", "e2", "status"),
        ("UPDATE edits SET status = 'reverted' WHERE id = 'e1'", "e1", "status"),
        ("UPDATE edits SET reason = 'because' WHERE id = 'e1'", "e1", "reason"),
        ("UPDATE edits SET client = 'another' WHERE id = 'e1'", "e1", "client"),
        ("UPDATE patches SET blob = source_blob WHERE id = 2", "patch 2 (e2, e3)", "blob"),
        ("UPDATE patches SET source_blob = 'x' WHERE id = 1", "patch 1 (e1)", "source_blob"),
        ("UPDATE patches SET position = 9 WHERE id = 1", "patch 1 (e1)", "position"),
        ("UPDATE patches SET params = '{}' WHERE id = 1", "patch 1 (e1)", "params"),
        ("UPDATE models SET base_hash = 'zz'", "model 1", "base_hash"),
        ("UPDATE measurements SET reliability = 1 WHERE occasion = 'audit'", "e1", "measurement"),
        ("UPDATE measurements SET measured = '{}' WHERE occasion = 'audit'", "e1", "measurement"),
        ("UPDATE models SET name = 'another'", "model 1", "name"),
        ("UPDATE models SET architecture = 'gpt2'", "model 1", "architecture"),
        ("UPDATE models SET created = ''", "model 1", "created"),
        ("INSERT INTO models VALUES (9, 'x', 'y', 'z', '')", "model 9", "not in any event"),
        ("UPDATE drift SET kl = 0 WHERE occasion = 'audit'", "drift 4", "altered"),
        ("UPDATE drift SET perplexity_after = 1 WHERE id = 1", "drift 1", "altered"),
        ("UPDATE drift SET at = '2020' WHERE id = 1", "drift 1", "altered"),
        ("UPDATE measurements SET occasion = 'apply' WHERE occasion = 'audit'", "e1", "measurement"),
        ("UPDATE measurements SET at = '2020' WHERE occasion = 'audit'", "e1", "measurement"),
        ("INSERT INTO event_edits VALUES ('e1', 4)", "event 4", "about e1, which it is not"),
        ("DELETE FROM measurements WHERE occasion = 'audit'", "e1", "missing"),
        ("UPDATE drift SET measured = '{}' WHERE occasion = 'audit'", "drift 4", "altered"),
        ("DELETE FROM drift WHERE occasion = 'audit'", "event 6", "missing"),
        ("DELETE FROM edits WHERE id = 'e4'", "e4", "missing"),
    ],
)
def test_a_row_changed_by_hand_is_named(written: Path, statement: str, where: str, says: str) -> None:
    problems = tamper(written, statement)
    assert any(p.kind == "row" and p.where == where and says in p.message for p in problems), problems


def test_an_edit_put_in_by_hand_is_named(written: Path) -> None:
    columns = "patch_id, model_id, status, request, subject, prompt, target, method, weights_hash_before"
    columns += ", weights_hash_after, subject_key, fact_key, created, changed"
    copy = f"INSERT INTO edits (id, row, {columns}) SELECT 'e9', 7, {columns} FROM edits WHERE id = 'e1'"
    assert [str(p) for p in tamper(written, copy)] == ["e9: is not in any event"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET payload = json_set(payload, '$.edits[0].request.target', 'Oslo') WHERE seq = 2",
        "UPDATE events SET at = '2020-01-01' WHERE seq = 2",
        "UPDATE events SET client = NULL WHERE seq = 2",
        "UPDATE events SET weights_hash = 'other' WHERE seq = 2",
        "UPDATE events SET kind = 'rejected' WHERE seq = 2",
        "UPDATE events SET edit_ids = '[]' WHERE seq = 2",
    ],
)
def test_an_event_that_was_altered_is_named(written: Path, statement: str) -> None:
    problems = tamper(written, *UNGUARDED, statement)
    assert any(p.kind == "chain" and p.where == "event 2" for p in problems), problems
    assert not any(p.kind == "chain" and p.where != "event 2" for p in problems), problems


@pytest.mark.parametrize(
    ("condition", "where"), [("seq = 1", "event 2"), ("seq = 3", "event 4"), ("seq > 3", "event 4")]
)
def test_events_that_were_removed_are_noticed(written: Path, condition: str, where: str) -> None:
    problems = tamper(written, *UNGUARDED, f"DELETE FROM events WHERE {condition}")
    assert any(p.kind == "chain" and p.where == where and "missing" in p.message for p in problems), problems


def test_an_event_that_is_not_json_is_named(written: Path) -> None:
    change = "UPDATE events SET payload = '{' WHERE seq = 2"
    problems = tamper(written, *UNGUARDED, "PRAGMA ignore_check_constraints = ON", change)
    assert any(p.kind == "chain" and p.where == "event 2" for p in problems), problems
    assert any(p.where == "e1" for p in problems)


def test_rewriting_history_with_fresh_hashes_still_disagrees_with_what_follows(written: Path) -> None:
    change = "UPDATE events SET hash = iif(hash LIKE 'f%', '0', 'f') || substr(hash, 2) WHERE seq = 2"
    assert {p.where for p in tamper(written, *UNGUARDED, change) if p.kind == "chain"} >= {
        "event 2",
        "event 3",
    }


def test_missing_guards_of_the_history_are_noticed(written: Path) -> None:
    problems = tamper(written, "DROP TRIGGER events_no_delete")
    assert [p.kind for p in problems] == ["sqlite"]
    assert "events_no_delete" in problems[0].message


def test_the_database_refuses_to_change_events(book: Book) -> None:
    book.apply("France")
    for statement in (
        "UPDATE events SET at = 'never'",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events SELECT * FROM events",
        "DELETE FROM event_edits",
    ):
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            book.ledger._db.execute(statement)
    assert book.ledger.verify() == []


def test_a_patch_file_that_is_gone_or_damaged_is_named_with_its_edits(written: Path) -> None:
    with Ledger.open(written, read_only=True) as ledger:
        first, second, third = (ledger.get_patch(i) for i in (1, 2, 3))
        ledger.blobs.path(first.source_blob).unlink()
        ledger.blobs.path(second.blob or "").write_bytes(b"Peru alobe")
        problems = ledger.verify()
        assert {(p.kind, p.where) for p in problems} == {
            ("blob", f"{first.source_blob}.safetensors"),
            ("blob", f"{second.blob}.safetensors"),
        }
        said = " ".join(p.message for p in problems)
        assert "missing" in said
        assert "damaged" in said
        assert "e1" in said
        assert "e2, e3" in said
        assert third.source_blob not in said
        assert ledger.verify(files=False) == []


def test_damaged_pages_are_reported_not_raised(written: Path) -> None:
    path = written / "ledger.db"
    conn = sqlite3.connect(path)
    [root] = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events'").fetchone()
    conn.close()
    data = bytearray(path.read_bytes())
    data[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    path.write_bytes(bytes(data))
    with Ledger.open(written, read_only=True) as ledger:
        assert ledger.get_edit("e1").subject == "France"
        problems = ledger.verify()
        with pytest.raises(DamagedLedger, match=r"ledger\.db"):
            ledger.events_of("e1")
    assert "sqlite" in {p.kind for p in problems}


def test_event_edits_and_a_trigger_that_was_rewritten_are_noticed(written: Path) -> None:
    problems = tamper(
        written, "DROP TRIGGER event_edits_no_delete", "DELETE FROM event_edits WHERE edit_id = 'e1'"
    )
    assert any("event_edits for e1 is missing" in p.message for p in problems)
    assert any("event_edits_no_delete, which guards the history, was removed" in p.message for p in problems)
    weaker = "CREATE TRIGGER event_edits_no_delete BEFORE DELETE ON event_edits BEGIN SELECT 1; END"
    assert any("event_edits_no_delete was altered" in p.message for p in tamper(written, weaker))


def test_a_patch_file_that_no_event_names_is_a_sign_of_loss(written: Path) -> None:
    from store import Blobs

    Blobs(written / "blobs").put(b"of an edit that the ledger has lost")
    [problem] = tamper(written)
    assert "1 patch files are named by no event" in problem.message


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DROP INDEX edits_fact", "index edits_fact was removed"),
        ("CREATE INDEX mine ON edits(target)", "index mine was added"),
        ("CREATE TABLE mine (x)", "table mine was added"),
        ("CREATE TRIGGER t AFTER INSERT ON edits BEGIN SELECT 1; END", "trigger t was added"),
        ("DROP TRIGGER edits_fts_insert", "trigger edits_fts_insert was removed"),
        ("INSERT INTO edits_fts(edits_fts) VALUES ('delete-all')", "search index"),
        (
            "INSERT INTO edits_fts(rowid, subject, prompt, target, reason) VALUES (99, 'a', 'b', 'c', 'd')",
            "search index",
        ),
    ],
)
def test_indexes_triggers_tables_and_the_search_index_are_checked_too(
    written: Path, statement: str, says: str
) -> None:
    assert any(p.kind == "sqlite" and says in p.message for p in tamper(written, statement))
