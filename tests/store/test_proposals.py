"""Proposals on the ledger: they wait, are decided once, and follow from the events like everything else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from store import Approval, BadFilter, Ledger, NoSuchProposal, ProposalRecord, Who, WrongState
from store.backup import backup, restore
from tests.store.conftest import WHO, Book

REQUEST = {"edits": [{"subject": "France", "prompt": "The capital of France is", "target": "Rome"}]}


def propose(book: Book, data: bytes | None = b"patch") -> ProposalRecord:
    return book.ledger.record_proposal(
        book.model,
        REQUEST,
        {"reliability": 1.0},
        data,
        {"before": "w0"},
        Who("agent", identity="ann"),
        reason="why",
    )


def test_a_proposal_waits_until_it_is_declined(book: Book) -> None:
    made = propose(book)
    assert (made.id, made.state, made.request, made.identity, made.reason) == (
        "p1",
        "waiting",
        REQUEST,
        "ann",
        "why",
    )
    assert [p.id for p in book.ledger.proposals("waiting")] == ["p1"]
    declined = book.ledger.record_decision("p1", "declined", Who("board", identity="bob"), "not so")
    assert (declined.state, declined.decided_identity, declined.note) == ("declined", "bob", "not so")
    assert book.ledger.count_proposals("waiting") == 0
    assert book.ledger.verify() == []


def test_a_proposal_is_approved_in_the_transaction_that_applies_it(book: Book) -> None:
    propose(book)
    book.ledger.record_patches([book.patch("France")], WHO, approval=Approval("p1", "good"))
    approved = book.ledger.get_proposal("p1")
    assert (approved.state, approved.edit_ids, approved.note) == ("approved", ("e1",), "good")
    assert book.ledger.verify() == []


def test_what_was_decided_is_not_decided_again_and_nothing_is_applied(book: Book) -> None:
    propose(book)
    book.ledger.record_decision("p1", "changes", WHO)
    with pytest.raises(WrongState, match="p1 was sent back for changes already"):
        book.ledger.record_patches([book.patch("France")], WHO, approval=Approval("p1"))
    assert book.ledger.list_edits().total == 0
    with pytest.raises(WrongState, match="already"):
        book.ledger.record_decision("p1", "declined", WHO)
    assert book.ledger.verify() == []


def test_a_proposal_that_does_not_exist_is_named(book: Book) -> None:
    for call in (book.ledger.get_proposal, lambda p: book.ledger.record_decision(p, "declined", WHO)):
        with pytest.raises(NoSuchProposal, match="'p9'"):
            call("p9")
    with pytest.raises(BadFilter, match="'lost'"):
        book.ledger.proposals("lost")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE proposals SET state = 'approved'", "state"),
        ("UPDATE proposals SET request = '{}'", "request"),
        ("UPDATE proposals SET identity = 'root'", "identity"),
        ("DELETE FROM proposals", "is missing from proposals"),
    ],
)
def test_tampering_with_a_proposal_is_found(home: Path, statement: str, says: str) -> None:
    with Ledger.open(home) as ledger:
        propose(Book(ledger))
    conn = sqlite3.connect(home / "ledger.db", isolation_level=None)
    conn.execute(statement)
    conn.close()
    with Ledger.open(home, read_only=True) as ledger:
        [problem] = ledger.verify()
        assert problem.where == "proposal p1"
        assert says in problem.message


def test_the_patch_of_a_proposal_is_part_of_a_backup(home: Path, tmp_path: Path) -> None:
    with Ledger.open(home) as ledger:
        blob = propose(Book(ledger)).blob
        backup(home, tmp_path / "copy")
    restore(tmp_path / "copy", tmp_path / "other")
    with Ledger.open(tmp_path / "other") as ledger:
        assert blob is not None
        assert ledger.blobs.get(blob) == b"patch"
        assert ledger.verify() == []
