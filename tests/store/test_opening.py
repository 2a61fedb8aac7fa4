from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from store import DamagedLedger, Ledger, LedgerError, LedgerInUse, LedgerReadOnly, NewerLedger
from tests.store.conftest import Book


def test_a_second_writer_is_refused_with_the_process_that_holds_the_home(book: Book, home: Path) -> None:
    code = "import sys, pathlib; from store import Ledger; Ledger.open(pathlib.Path(sys.argv[1]))"
    second = subprocess.run(
        [sys.executable, "-c", code, str(home)], capture_output=True, text=True, check=False
    )
    assert second.returncode == 1
    assert "LedgerInUse" in second.stderr
    assert f"process {os.getpid()}" in second.stderr
    with pytest.raises(LedgerInUse, match="--read-only"):
        Ledger.open(home)


def test_a_closed_ledger_can_be_opened_again_with_everything_in_it(home: Path) -> None:
    with Ledger.open(home) as ledger:
        Book(ledger).apply("France")
        ledger.close()
    with Ledger.open(home) as ledger:
        assert ledger.get_edit("e1").subject == "France"
        assert ledger.verify() == []
    with pytest.raises(LedgerError, match="closed"):
        ledger.get_edit("e1")


def test_reading_goes_on_beside_the_writer_and_sees_what_it_writes(book: Book, home: Path) -> None:
    with Ledger.open(home, read_only=True) as reader:
        assert reader.list_edits().total == 0
        book.apply("France")
        assert reader.get_edit("e1").subject == "France"
        assert reader.verify() == []
        with pytest.raises(LedgerReadOnly):
            Book(reader).apply("Italy")
        with pytest.raises(LedgerReadOnly):
            reader.record_reverted(["e1"], "w", restack={1: b"never written"})
        with pytest.raises(LedgerReadOnly):
            reader.create_job("train", {})
    assert len(book.ledger.blobs.names()) == 1


def test_a_reader_of_a_new_home_sees_an_empty_ledger(home: Path) -> None:
    with Ledger.open(home, read_only=True) as reader:
        assert reader.list_edits().total == 0
        assert reader.find_model("x") is None
        assert reader.query("SELECT count(*) FROM edits").rows == [[0]]
    with Ledger.open(home) as ledger:
        assert not ledger.read_only


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_is_not_a_database_is_named_and_left_alone(home: Path, read_only: bool) -> None:
    home.mkdir()
    (home / "ledger.db").write_bytes(b"not a database, but somebody's text " * 100)
    before = (home / "ledger.db").read_bytes()
    with pytest.raises(DamagedLedger, match=r"ledger\.db.*not a database"):
        Ledger.open(home, read_only)
    assert (home / "ledger.db").read_bytes() == before
    (home / "ledger.db").unlink()
    Ledger.open(home, read_only).close()  # the refusal gave the lock back


def test_a_database_of_another_program_is_refused_by_name(home: Path) -> None:
    home.mkdir()
    other = sqlite3.connect(home / "ledger.db")
    other.execute("CREATE TABLE edits (x)")
    other.close()
    with pytest.raises(DamagedLedger, match=r"ledger\.db.*edits.*exists"):
        Ledger.open(home)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_ledger_of_a_newer_version_is_refused(home: Path, read_only: bool) -> None:
    Ledger.open(home).close()
    later = sqlite3.connect(home / "ledger.db")
    later.execute(
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('errata', 'm0099_x', '')"
    )
    later.commit()
    later.close()
    with pytest.raises(NewerLedger, match=r"m0099_x.*upgrade"):
        Ledger.open(home, read_only)


def test_an_interrupted_migration_is_finished_at_the_next_opening(home: Path) -> None:
    Ledger.open(home).close()
    (home / "ledger.db").write_bytes(b"")
    with Ledger.open(home) as ledger:
        assert ledger.verify() == []


def test_a_home_that_is_a_file_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="file"):
        Ledger.open(tmp_path / "file")


def test_partial_files_of_a_killed_writer_are_deleted(home: Path) -> None:
    Ledger.open(home).close()
    (home / "blobs").mkdir(exist_ok=True)
    (home / "blobs" / ".writing-abc").write_bytes(b"half")
    Ledger.open(home).close()
    assert list((home / "blobs").iterdir()) == []


def test_the_database_is_durable_and_checks_its_references(book: Book, home: Path) -> None:
    assert book.ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert book.ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert book.ledger._db.execute("PRAGMA foreign_keys").fetchone()[0] == 1
