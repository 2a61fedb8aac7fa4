"""A change that fails at any of its steps leaves the tables and the patch files as they were."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from store import Ledger, LedgerError, NewPatch, RecordedPatch, WrongState
from tests.store.conftest import WHO, Book

TABLES = ("models", "events", "event_edits", "patches", "edits", "measurements", "drift", "vectors", "jobs")


def state_of(ledger: Ledger) -> dict[str, Any]:
    """Every row of every table, and every file with its bytes."""
    rows = {table: [tuple(row) for row in ledger._rows(f"SELECT * FROM {table}")] for table in TABLES}
    return rows | {path.name: path.read_bytes() for path in sorted(ledger.blobs.folder.glob("*"))}


@contextmanager
def failing(ledger: Ledger, step: int, error: BaseException, *, after: bool = False) -> Iterator[list[str]]:
    """Raise at the given SQL statement or file, instead of it or right `after` it; gives the steps so far."""
    steps: list[str] = []
    execute, put = ledger._db.execute, ledger.blobs.put

    def counted(what: str, do: Callable[[], Any]) -> Any:
        steps.append(what)
        result = do() if after or len(steps) != step + 1 else None
        if len(steps) == step + 1:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger._db, "execute", lambda sql, *a: counted(sql, lambda: execute(sql, *a)))
        patch.setattr(ledger.blobs, "put", lambda data: counted("file", lambda: put(data)))
        yield steps


def three(book: Book) -> list[NewPatch]:
    return [book.patch("France", "Italy", target="Lyon"), book.patch("Peru"), book.patch("Chad", "Mali")]


def record_three(book: Book) -> None:
    book.ledger.record_patches(three(book), WHO, replaced=["e2"], restack={1: b"e1 alone"})


def record_rejected(book: Book) -> None:
    book.ledger.record_rejected(book.patch("Peru"), ["max_drift"], WHO)


def revert(book: Book) -> None:
    book.ledger.record_reverted(["e1"], "w", WHO, restack={1: b"e2 alone"}, drift={"kl": 0.1})


def reapply(book: Book) -> None:
    book.ledger.record_reapplied(["e3"], "w", WHO, measurements={"e3": {"reliability": 1.0}})


def replace_vector(book: Book) -> None:
    book.ledger.record_vector(book.model, "mood", b"another", {"method": "caa"}, WHO, replace=True)


def remove_vector(book: Book) -> None:
    book.ledger.remove_vector(book.model, "mood", WHO)


CHANGES = [record_three, record_rejected, revert, reapply, replace_vector, remove_vector]
ERRORS = [sqlite3.OperationalError("disk I/O error"), OSError(28, "No space left"), KeyboardInterrupt()]


def fill(book: Book) -> None:
    book.apply("Italy", "Spain")
    book.apply("Norway")
    book.ledger.record_reverted(["e3"], "w2", WHO)
    book.ledger.record_vector(book.model, "mood", b"one", {"method": "caa"}, WHO)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_at_any_step_leaves_everything_as_it_was(
    book: Book, change: Callable[[Book], None], error: BaseException
) -> None:
    fill(book)
    before = state_of(book.ledger)
    for step in count():
        with failing(book.ledger, step, error) as steps:
            try:
                change(book)
                break
            except (LedgerError, type(error)):
                pass
        assert state_of(book.ledger) == before, steps[step]
        assert book.ledger.verify() == []
    assert steps[-1] == "COMMIT"
    assert step == len(steps) > 3
    assert state_of(book.ledger) != before
    assert book.ledger.verify() == []


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupt_right_after_any_step_leaves_all_or_nothing(
    book: Book, change: Callable[[Book], None]
) -> None:
    fill(book)
    before = state_of(book.ledger)
    for step in count():
        interrupt = KeyboardInterrupt()
        with failing(book.ledger, step, interrupt, after=True) as steps, pytest.raises(KeyboardInterrupt):
            change(book)
        assert (state_of(book.ledger) == before) == (steps[-1] != "COMMIT"), steps[-1]
        assert book.ledger.verify() == []  # so the files of what was committed are there
        if steps[-1] == "COMMIT":
            break


def test_a_file_that_was_there_before_a_failed_change_stays(book: Book) -> None:
    patch = book.patch("France")
    book.ledger.record_applied(patch, WHO)
    with pytest.raises(WrongState):
        book.ledger.record_applied(book.patch("Italy", blob=patch.blob), WHO, replaced=["e1", "e1"])
    assert book.ledger.verify() == []


def test_several_patches_are_recorded_together_in_order(book: Book) -> None:
    book.apply("Italy", "Spain")
    patches = three(book)
    recorded = book.ledger.record_patches(patches, WHO, replaced=["e1"], restack={1: b"Spain alone"})
    assert recorded == [
        RecordedPatch(2, 2, ("e3", "e4")),
        RecordedPatch(3, 3, ("e5",)),
        RecordedPatch(4, 4, ("e6", "e7")),
    ]
    old = book.ledger.get_edit("e1")
    assert (old.status, old.replaced_by) == ("replaced", "e4")
    stack = book.ledger.stack(book.model)
    assert [entry.edit_ids for entry in stack] == [("e1", "e2"), *(r.edit_ids for r in recorded)]
    assert [book.ledger.blobs.get(entry.blob) for entry in stack[1:]] == [patch.blob for patch in patches]
    assert book.ledger.expected_weights_hash(book.model) == patches[-1].weights_hash_after
    assert book.ledger.verify() == []


def test_several_patches_leave_the_tables_that_one_after_the_other_leaves(tmp_path: Path) -> None:
    together, apart = Book(Ledger.open(tmp_path / "a")), Book(Ledger.open(tmp_path / "b"))
    together.ledger.record_patches(three(together), WHO)
    for patch in three(apart):
        apart.ledger.record_applied(patch, WHO)
    for sql in (
        "SELECT id, seq, patch_id, row, status, request, subject, fact_key, weights_hash_after FROM edits",
        "SELECT id, position, source_blob, blob, params, weights_hash_before, event_seq FROM patches",
        "SELECT seq, kind, edit_ids, weights_hash, state_hash, payload FROM events WHERE seq > 1",
        "SELECT edit_id, event_seq, occasion, measured FROM measurements",
        "SELECT event_seq, occasion, kl, measured FROM drift",
    ):
        assert together.ledger.query(sql).rows == apart.ledger.query(sql).rows
    together.ledger.close()
    apart.ledger.close()


def test_one_patch_that_cannot_be_recorded_keeps_the_others_out(book: Book) -> None:
    before = state_of(book.ledger)
    for wrong in (book.patch("Mali", measurements=[{}, {}]), book.patch("Mali", model_id=99)):
        with pytest.raises(LedgerError):
            book.ledger.record_patches([*three(book), wrong], WHO)
    with pytest.raises(LedgerError, match="no patch"):
        book.ledger.record_patches([], WHO)
    assert state_of(book.ledger) == before


def test_a_vector_is_replaced_only_when_that_is_asked_for(book: Book) -> None:
    book.ledger.record_vector(book.model, "mood", b"one", {"method": "caa"}, WHO)
    with pytest.raises(WrongState, match="mood"):
        book.ledger.record_vector(book.model, "mood", b"two", {"method": "pca"}, WHO)
    vector = book.ledger.record_vector(book.model, "mood", b"two", {"method": "pca"}, WHO, replace=True)
    assert (vector.method, book.ledger.blobs.get(vector.blob)) == ("pca", b"two")
    assert book.ledger.vectors(book.model) == [vector]
    kinds = [kind for [kind] in book.ledger.query("SELECT kind FROM events ORDER BY seq").rows]
    assert kinds == ["model_added", "vector_created", "vector_deleted", "vector_created"]
    assert book.ledger.verify() == []


def test_replacing_a_vector_that_is_not_there_creates_it(book: Book) -> None:
    book.ledger.record_vector(book.model, "mood", b"one", {"method": "caa"}, WHO, replace=True)
    assert [vector.name for vector in book.ledger.vectors(book.model)] == ["mood"]
    assert book.ledger.verify() == []
