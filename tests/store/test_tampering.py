"""What is changed behind the ledger's back is noticed: every table, column and index, and every *.safetensors of
blobs and statistics.

What is not covered is listed here, and README says so: jobs and the states of facts are working state.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from store import Approval, Ledger
from store.blobs import sha256
from tests.store.conftest import WHO, Book

UNCOVERED = {"jobs", "fact_states", "_sqlite_migrations", "sqlite_sequence"}


@cache
def _written() -> Path:
    """A home with rows in every table."""
    folder = TemporaryDirectory(prefix="errata-tampering-")
    atexit.register(folder.cleanup)
    home = Path(folder.name) / "home"
    with Ledger.open(home) as ledger:
        book = Book(ledger)
        ledger.model("other" * 12, "another", "gpt2")
        book.apply("France")
        book.apply("Italy", "Peru")
        ledger.record_reverted(["e2"], "w", WHO, restack={2: b"Peru alone"})
        ledger.record_measurements({"e1": {"reliability": 0.5}}, "audit", {"kl": 0.2}, WHO)
        for name in ("joy", "calm"):
            ledger.record_vector(book.model, name, name.encode(), {"method": "caa", "layers": [1]}, WHO)
        fact = {"subject": "Chad", "prompt": "The capital of Chad is", "answer": "N'Djamena"}
        ledger.save_facts(
            "capitals", 1, {"from": "a file"}, {1: fact, 2: {**fact, "subject": "Mali"}}, (), WHO
        )
        for n in range(2):
            ledger.record_proposal(book.model, {"edits": [fact]}, {}, b"patch %d" % n, {"before": "w"}, WHO)
        ledger.record_patches([book.patch("Chad")], WHO, approval=Approval("p1", "good"))
        (home / "statistics").mkdir()
        made = home / "statistics" / "layer-1-self.safetensors"
        made.write_bytes(b"moments")
        ledger.record_made_files({made: sha256(b"of a first time")})
        ledger.record_made_files({made: sha256(b"moments")})
        assert ledger.verify() == []
        assert ledger.changed_files() == []
    return home


def _tables() -> dict[str, list[tuple[str, str]]]:
    """Every table that is not the search index's own: its columns with their types."""
    with closing(sqlite3.connect(_written() / "ledger.db")) as conn:
        names = [
            name
            for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("edits_fts")
        ]
        return {
            name: [(row[1], row[2]) for row in conn.execute(f"PRAGMA table_info({name})")] for name in names
        }


COLUMNS = [
    (table, column, kind)
    for table, columns in _tables().items()
    if table not in UNCOVERED
    for column, kind in columns
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    shutil.copytree(_written(), tmp_path / "home")
    return tmp_path / "home"


def _change(home: Path, *statements: str) -> int:
    """Run statements as somebody with SQLite would who takes the guards off and puts them back; rows changed."""
    with closing(sqlite3.connect(home / "ledger.db", isolation_level=None)) as conn:
        conn.execute("PRAGMA foreign_keys = OFF")
        conn.execute("PRAGMA ignore_check_constraints = ON")
        guards = conn.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'event%'"
        ).fetchall()
        for name, _ in guards:
            conn.execute(f"DROP TRIGGER {name}")
        changed = sum(conn.execute(statement).rowcount for statement in statements)
        for _, sql in guards:
            conn.execute(sql)
        return changed


def _noticed(home: Path) -> list[str]:
    with Ledger.open(home, read_only=True) as ledger:
        return [str(problem) for problem in (*ledger.verify(), *ledger.changed_files())]


def _other(column: str, kind: str) -> str:
    """Another value of the same type."""
    if "INT" in kind or "REAL" in kind:
        return f"-1000 - coalesce({column}, 0)"
    return f"CASE WHEN json_valid({column}) THEN '[\"other\"]' ELSE coalesce({column}, '') || 'x' END"


def test_every_table_is_covered_or_said_not_to_be() -> None:
    covered = {table for table, _, _ in COLUMNS}
    assert covered | UNCOVERED >= set(_tables())
    assert {"models", "events", "event_edits", "edits", "patches", "measurements", "drift"} < covered
    with closing(sqlite3.connect(_written() / "ledger.db")) as conn:
        for table in covered:
            assert conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0], table


@pytest.mark.parametrize(("table", "column", "kind"), COLUMNS, ids=[f"{t}.{c}" for t, c, _ in COLUMNS])
def test_a_value_that_was_changed_is_noticed(home: Path, table: str, column: str, kind: str) -> None:
    row = f"(SELECT {column} FROM {table} LIMIT 1 OFFSET (SELECT count(*) - 1 FROM {table}))"
    assert _change(home, f"UPDATE {table} SET {column} = {_other(column, kind)} WHERE {column} IS {row}")
    assert _noticed(home)


@pytest.mark.parametrize("table", sorted({table for table, _, _ in COLUMNS}))
@pytest.mark.parametrize("which", ["ASC", "DESC"])
def test_a_row_that_was_removed_is_noticed(home: Path, table: str, which: str) -> None:
    first = _tables()[table][0][0]
    chosen = f"SELECT {first} FROM {table} ORDER BY {first} {which} LIMIT 1"
    assert _change(home, f"DELETE FROM {table} WHERE {first} = ({chosen})")
    assert _noticed(home)


def _objects() -> Iterator[tuple[str, str]]:
    with closing(sqlite3.connect(_written() / "ledger.db")) as conn:
        yield from conn.execute(
            "SELECT type, name FROM sqlite_master WHERE type IN ('index', 'trigger', 'view') AND sql IS NOT NULL"
        )


@pytest.mark.parametrize(("kind", "name"), list(_objects()), ids=str)
def test_an_index_a_trigger_or_a_view_that_was_removed_is_noticed(home: Path, kind: str, name: str) -> None:
    with closing(sqlite3.connect(home / "ledger.db", isolation_level=None)) as conn:
        conn.execute(f"DROP {kind} {name}")
    assert any(name in problem for problem in _noticed(home))


def _files() -> list[str]:
    return sorted(
        path.relative_to(_written()).as_posix()
        for folder in ("blobs", "statistics")
        for path in (_written() / folder).rglob("*.safetensors")
    )


@pytest.mark.parametrize("how", ["changed", "cut", "emptied", "another's", "a pipe", "a folder", "a link"])
def test_a_file_that_was_changed_is_noticed(home: Path, how: str) -> None:
    files = _files()
    for i, name in enumerate(files):
        path = home / name
        data, other = path.read_bytes(), (home / files[i - 1]).read_bytes()
        path.unlink()
        if how == "a pipe":
            os.mkfifo(path)
        elif how == "a folder":
            path.mkdir()
        elif how == "a link":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes({"changed": b"x" + data[1:], "cut": data[:-1], "emptied": b""}.get(how, other))
        problems = _noticed(home)
        assert any(Path(name).name in problem for problem in problems), (name, problems)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(data)
    assert _noticed(home) == []


def test_a_patch_file_that_is_gone_is_noticed_and_a_made_one_is_made_again(home: Path) -> None:
    for name in _files():
        data = (home / name).read_bytes()
        (home / name).unlink()
        assert bool(_noticed(home)) == name.startswith("blobs")
        (home / name).write_bytes(data)
