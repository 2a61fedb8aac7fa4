"""What is lost behind the ledger's back is said by name, and nothing is written until somebody has decided."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from store import Blobs, DamagedLedger, Ledger, LedgerError, LedgerInUse
from tests.conftest import ROOT
from tests.store.conftest import Book
from tests.store.test_crash import write_until_killed

OLD_HOME = ROOT / "tests" / "homes" / "0.1.0"


@pytest.fixture
def written(home: Path) -> Path:
    """A home with four edits; beside it `home-before`, as it was after the first of them."""
    with Ledger.open(home) as ledger:
        Book(ledger).apply("France")
    shutil.copytree(home, home.with_name("home-before"))
    with Ledger.open(home) as ledger:
        book = Book(ledger)
        for subject in ("Italy", "Peru", "Chad"):
            book.apply(subject)
    return home


def older(home: Path) -> None:
    shutil.copy(home.with_name("home-before") / "ledger.db", home / "ledger.db")


def without_tables(home: Path) -> None:
    (home / "ledger.db").unlink()
    conn = sqlite3.connect(home / "ledger.db", isolation_level=None)
    conn.execute("PRAGMA user_version = 1")
    conn.close()


def of_another_home(home: Path) -> None:
    with Ledger.open(home.with_name("other")) as ledger:
        for i in range(9):
            Book(ledger).apply(f"land {i}")
    shutil.copy(home.with_name("other") / "ledger.db", home / "ledger.db")


LOSSES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda home: (home / "ledger.db").unlink(),
    "emptied": lambda home: (home / "ledger.db").write_bytes(b""),
    "without tables": without_tables,
    "an older copy": older,
    "of another home": of_another_home,
    "an older copy, without head.json": lambda home: [older(home), (home / "head.json").unlink()],
    "deleted with head.json": lambda home: [(home / "ledger.db").unlink(), (home / "head.json").unlink()],
    "deleted with the patch files": lambda home: [
        (home / "ledger.db").unlink(),
        shutil.rmtree(home / "blobs"),
    ],
}


SQLITES = ("lock", "ledger.db-wal", "ledger.db-shm")


def files_of(home: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name not in SQLITES
    }


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_history_is_said_by_name_and_stays_as_it_is(written: Path, loss: str, read_only: bool) -> None:
    LOSSES[loss](written)
    before = files_of(written)
    for _ in range(2):  # a second start forgets nothing
        with Ledger.open(written, read_only) as ledger:
            said = "; ".join(map(str, ledger.verify()))
            assert "lost" in said or "missing" in said or "another history" in said
            assert "errata-mcp restore" in said
            assert "errata-mcp recover" in said
            ledger.list_edits()
            if ledger.lost and not read_only:
                with pytest.raises(DamagedLedger, match="nothing was recorded"):
                    Book(ledger).apply("Oslo")
    after = files_of(written)
    assert {p for p in after if p.suffix == ".safetensors"} == {
        p for p in before if p.suffix == ".safetensors"
    }
    if "head.json" not in loss:
        assert after == before


def test_a_database_that_was_cut_off_is_never_taken_for_whole(written: Path) -> None:
    whole = (written / "ledger.db").read_bytes()
    chance = random.Random(5)
    sizes = [1, 99, 100, 512, 4096, 4097, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(12))]
    for size in sizes:
        (written / "ledger.db").write_bytes(whole[:size])
        try:
            ledger = Ledger.open(written)
        except LedgerError as error:
            assert "ledger.db" in str(error)  # noqa: PT017
            continue
        with ledger:
            assert ledger.verify() or ledger.list_edits().total == 4, size


def test_the_log_beside_the_database_may_be_lost_at_any_kill(home: Path) -> None:
    """What was acknowledged is in the database file itself, unless a reader was in the way of writing it there."""
    chance = random.Random(11)
    applied: list[str] = []
    for _ in range(5):
        for line in write_until_killed(home, chance.randint(2, 12)):
            applied += line.get("applied", [])  # type: ignore[arg-type]
        for name in ("ledger.db-wal", "ledger.db-shm"):
            (home / name).unlink(missing_ok=True)
        with Ledger.open(home) as ledger:
            assert ledger.verify() == []
            ledger.edits(applied)
    assert len(applied) >= 5


def blocked(home: Path) -> sqlite3.Connection:
    """A reader that keeps what is written from being moved out of the log into the database file."""
    reader = sqlite3.connect(home / "ledger.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM edits").fetchall()
    return reader


def test_a_log_that_was_lost_while_a_reader_was_in_the_way_is_missed(written: Path) -> None:
    copy = written.with_name("copy")
    reader = blocked(written)
    with Ledger.open(written) as ledger:
        Book(ledger).apply("Oslo")
        Book(ledger).apply("Rome")
        shutil.copytree(written, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    reader.close()
    with Ledger.open(copy) as ledger:
        assert "are missing" in ledger.lost
        assert ledger.verify()


SECOND = "import sys, pathlib; from store import Ledger; Ledger.open(pathlib.Path(sys.argv[1]))"


@pytest.mark.skipif(sys.platform == "win32", reason="a locked file cannot be deleted there")
def test_a_deleted_lock_file_lets_no_second_writer_in(book: Book, home: Path) -> None:
    book.apply("France")
    for _ in range(2):
        (home / "lock").unlink()
        with pytest.raises(LedgerInUse):
            Ledger.open(home)
        command = [sys.executable, "-c", SECOND, str(home)]
        second = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert "LedgerInUse" in second.stderr
    book.apply("Italy")
    book.ledger.close()
    Ledger.open(home).close()


def test_events_of_another_writer_are_noticed_before_anything_is_recorded(book: Book, home: Path) -> None:
    book.apply("France")
    foreign = sqlite3.connect(home / "ledger.db", isolation_level=None)
    foreign.execute(
        "INSERT INTO events (seq, at, kind, edit_ids, payload, prev_hash, hash)"
        " VALUES (3, '', 'x', '[]', '{}', '', '')"
    )
    for _ in range(2):
        with pytest.raises(DamagedLedger, match=r"another program wrote to .*ledger\.db"):
            book.apply("Italy")
    assert book.ledger.list_edits().total == 1
    assert len(book.ledger.blobs.names()) == 1
    foreign.close()


@pytest.mark.parametrize(
    "sql", ["UPDATE edits SET target = 'Oslo'", "DELETE FROM drift", "DROP INDEX edits_fact"]
)
def test_rows_that_another_program_changed_are_noticed_before_anything_is_recorded(
    book: Book, home: Path, sql: str
) -> None:
    book.apply("France")
    foreign = sqlite3.connect(home / "ledger.db", isolation_level=None)
    foreign.execute(sql)
    foreign.close()
    with pytest.raises(DamagedLedger, match=r"another program changed .*ledger\.db"):
        book.apply("Italy")
    assert book.ledger.list_edits().total == 1


def test_what_another_program_writes_where_it_harms_nothing_is_let_through(book: Book, home: Path) -> None:
    book.apply("France")
    book.ledger.create_job("train", {})
    foreign = sqlite3.connect(home / "ledger.db", isolation_level=None)
    foreign.execute("UPDATE jobs SET message = 'seen'")
    foreign.close()
    book.apply("Italy")
    assert book.ledger.verify() == []


READ = """
import sys, pathlib
from store import Ledger
with Ledger.open(pathlib.Path(sys.argv[1]), read_only=True) as ledger:
    assert ledger.verify() == [], ledger.verify()
    print([edit.subject for edit in ledger.list_edits().edits], ledger.query("SELECT count(*) FROM edits").rows)
"""
MOUNT = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/x" && exec "$2" -c "$3" "$1"'


def mounted_read_only(home: Path) -> str:
    """What a reader prints that has HOME mounted read-only. Skips where nothing can be mounted."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    command = ["unshare", "-m", "sh", "-c", MOUNT, "sh", str(home), sys.executable, READ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_home_on_a_read_only_mount_opens_for_reading(written: Path) -> None:
    before = sorted(path.name for path in written.iterdir())
    assert mounted_read_only(written) == "['Chad', 'Peru', 'Italy', 'France'] [[4]]"
    assert sorted(path.name for path in written.iterdir()) == before


def test_a_home_of_a_killed_writer_on_a_read_only_mount_is_read_with_its_log(written: Path) -> None:
    copy = written.with_name("copy")
    reader = blocked(written)
    write_until_killed(written, 3)
    shutil.copytree(written, copy, ignore=shutil.ignore_patterns("*-shm"))
    reader.close()
    assert (copy / "ledger.db-wal").stat().st_size > 0
    assert "'Chad', 'Peru', 'Italy', 'France']" in mounted_read_only(copy)


def test_a_home_of_0_1_0_on_a_read_only_mount_is_read_as_a_copy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(OLD_HOME, home)
    before = (home / "ledger.db").read_bytes()
    assert mounted_read_only(home).startswith("[")
    assert (home / "ledger.db").read_bytes() == before


def test_a_reader_is_told_that_another_process_wrote(book: Book, home: Path) -> None:
    with Ledger.open(home, read_only=True) as reader:
        reader.changed()
        assert not reader.changed()
        book.apply("France")
        assert reader.changed()
        assert reader.get_edit("e1").subject == "France"
        assert not reader.changed()


def test_a_home_of_an_older_version_keeps_what_its_killed_writers_left(tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(OLD_HOME, home)
    Blobs(home / "blobs").put(b"of a change that 0.1.0 was killed in")
    for _ in range(2):
        with Ledger.open(home) as ledger:
            assert ledger.verify() == []
    assert (home / "head.json").exists()
    Blobs(home / "blobs").put(b"of a change that was lost later")
    with Ledger.open(home) as ledger:
        assert len(ledger.verify()) == 1
