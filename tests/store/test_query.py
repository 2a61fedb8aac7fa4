from __future__ import annotations

import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from store import Ledger, QueryError, query
from store.query import AT_ONCE
from tests.store.conftest import Book


def test_a_select_answers_with_columns_and_rows(book: Book) -> None:
    book.apply("France", "Italy")
    found = book.ledger.query("SELECT id, subject AS s FROM edits WHERE row = ? ORDER BY seq", [1])
    assert found == (["id", "s"], [["e2", "Italy"]], False)
    assert book.ledger.query("SELECT :a + 1 AS b", {"a": 1}).rows == [[2]]


def test_json_and_full_text_can_be_used(book: Book) -> None:
    book.apply("France")
    assert book.ledger.query("SELECT json_extract(params, '$.layers[0]') FROM patches").rows == [[3]]
    assert book.ledger.query("SELECT value FROM events, json_each(edit_ids)").rows == [["e1"]]
    matching = (
        "SELECT id FROM edits WHERE seq IN (SELECT rowid FROM edits_fts WHERE edits_fts MATCH 'france')"
    )
    assert book.ledger.query(matching).rows == [["e1"]]


def test_rows_beyond_the_limit_are_left_out_and_the_result_says_so(book: Book) -> None:
    count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 5) SELECT x FROM c"
    assert book.ledger.query(count, limit=4) == (["x"], [[1], [2], [3], [4]], True)
    assert book.ledger.query(count, limit=5).truncated is False
    for limit in (0, -1, 1001):
        with pytest.raises(QueryError, match="limit"):
            book.ledger.query(count, limit=limit)


def test_values_that_do_not_fit_an_answer_are_described(book: Book) -> None:
    [row] = book.ledger.query("SELECT zeroblob(12), printf('%.*c', 5000, 'x'), 9e999, NULL, 1.5").rows
    assert row[0] == "<12 bytes>"
    assert row[1].endswith("... (cut; 5,000 characters)")
    assert row[2:] == ["inf", None, 1.5]
    long = book.ledger.query(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 900)"
        " SELECT printf('%.*c', 3900, 'x') FROM c",
        limit=1000,
    )
    assert long.truncated
    assert len(long.rows) < 60


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM edits",
        "UPDATE edits SET target = 'x'",
        "INSERT INTO models (name) VALUES ('x')",
        "REPLACE INTO models (name) VALUES ('x')",
        "WITH x AS (SELECT 1) DELETE FROM edits",
        "INSERT INTO edits_fts (edits_fts) VALUES ('rebuild')",
        "DELETE FROM edits RETURNING *",
        "DROP TABLE edits",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE TEMP TRIGGER x AFTER INSERT ON edits BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE x USING fts5(y)",
        "ALTER TABLE edits ADD COLUMN x",
        "UPDATE sqlite_master SET sql = ''",
        "ATTACH DATABASE '{home}/stolen.db' AS x",
        "VACUUM",
        "VACUUM INTO '{home}/stolen.db'",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "PRAGMA user_version = 7",
        "SELECT * FROM pragma_user_version(7)",
        "SELECT load_extension('x')",
        "SELECT writefile('{home}/stolen.db', 'x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT fts3_tokenizer('simple')",
        "BEGIN",
        "COMMIT",
        "SAVEPOINT x",
        "REINDEX",
        "ANALYZE",
        "SELECT 1; DROP TABLE edits",
        "SELECT 1; SELECT 2",
    ],
)
def test_sql_that_does_more_than_read_is_refused(book: Book, home: Path, sql: str) -> None:
    book.apply("France")
    before = {path.name for path in home.iterdir()}
    with pytest.raises(QueryError):
        book.ledger.query(sql.format(home=home))
    assert book.ledger.query("SELECT subject FROM edits").rows == [["France"]]
    assert book.ledger.verify() == []
    assert {path.name for path in home.iterdir()} == before
    book.apply("Italy")


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT * FROM edit", "edits, edits_fts"),
        ("SELECT tarket FROM edits", "target"),
        ("SELEC 1", "syntax error"),
        ("  ", "empty"),
        ("-- nothing", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT at a time"),
        ("DELETE FROM edits", "only reading is allowed"),
        ("SELECT ?", "bindings"),
        ("SELECT '\x00'", "null character"),
        ("SELECT '\ud800'", "surrogates"),
        ("SELECT 1" + " " * 30_000, "30,008 characters"),
        ("SELECT hex(zeroblob(900000000))", "too big"),
        ("SELECT * FROM edits_fts WHERE edits_fts MATCH '\"'", "unterminated"),
    ],
)
def test_errors_say_what_is_wrong_and_name_the_tables_and_columns(book: Book, sql: str, says: str) -> None:
    with pytest.raises(QueryError) as caught:
        book.ledger.query(sql)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("params", [[1, 2], [[1]], [{}], [2**70], ["\ud800"], {"b": 1}, [object()]])
def test_parameters_that_do_not_fit_are_an_error_not_a_crash(book: Book, params: object) -> None:
    with pytest.raises(QueryError):
        book.ledger.query("SELECT :a", params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c WHERE x < 0",
    ],
)
def test_a_query_that_never_ends_is_stopped(book: Book, sql: str) -> None:
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0\.2 s"):
        book.ledger.query(sql, seconds=0.2)
    assert time.monotonic() - start < 5


COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {n})"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')",
        f"{COUNT.format(n=9)} SELECT sum(instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || x)) FROM c",
        f"SELECT printf('%.*c', 9000000, 'a') LIKE '%{'a' * 900}b%'",
        f"SELECT printf('%.*c', 9000000, 'a') GLOB '*{'a' * 900}b*'",
        f"{COUNT.format(n=10**12)} SELECT max(replace(hex(randomblob(9000000)), '7', '77')) FROM c",
        f"{COUNT.format(n=10**12)} SELECT x, hex(randomblob(10)) FROM c ORDER BY 2",
        f"{COUNT.format(n=10**12)} SELECT group_concat(printf('%.*c', 1000, 'x')) FROM c",
        f"{COUNT.format(n=10**12)} SELECT sum(length(printf('%.*c', 15000000, 'x'))) FROM c",
        f"{COUNT.format(n=3000)} SELECT count(*) FROM c a, c b, c d, c e",
        f"{COUNT.format(n=10**12)} SELECT x FROM c EXCEPT SELECT x + 1 FROM c",
    ],
)
def test_whatever_a_query_asks_of_sqlite_it_ends_within_its_time_and_memory(book: Book, sql: str) -> None:
    book.apply("France")
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0\.5 s|memory|too big"):
        book.ledger.query(sql, seconds=0.5)
    assert time.monotonic() - start < 4
    assert book.ledger.query("SELECT id FROM edits").rows == [["e1"]]  # the next query has a process again


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
        f"{COUNT.format(n=10**12)} SELECT max(replace(hex(randomblob(9000000)), '7', '77')) FROM c",
    ],
)
def test_the_limit_is_what_the_caller_waits_with_the_start_of_a_process(book: Book, sql: str) -> None:
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 2 s"):
        book.ledger.query(sql, seconds=2)
    assert time.monotonic() - start < 2


def test_the_limit_holds_for_queries_that_wait_for_others_first(book: Book) -> None:
    def ask(_: int) -> float:
        start = time.monotonic()
        with pytest.raises(QueryError, match=r"longer than 2 s|other queries are running"):
            book.ledger.query(f"{COUNT.format(n=10**12)} SELECT count(*) FROM c", seconds=2)
        return time.monotonic() - start

    with ThreadPoolExecutor(2 * AT_ONCE) as pool:
        assert max(pool.map(ask, range(2 * AT_ONCE))) < 2


def test_a_process_that_does_not_even_start_in_time_is_killed(
    book: Book, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asleep = tmp_path / "asleep.py"
    asleep.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(query, "_PROGRAM", str(asleep))
    start = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 1 s"):
        book.ledger.query("SELECT 1", seconds=1)
    assert time.monotonic() - start < 1


def test_large_values_are_cut_one_row_at_a_time_and_the_answer_stays_small(book: Book) -> None:
    before = psutil.Process().memory_info().rss
    found = book.ledger.query(f"{COUNT.format(n=40)} SELECT printf('%.*c', 15000000, 'x') FROM c", seconds=20)
    assert len(found.rows) == 40
    wide = ", ".join(["printf('%.*c', 3999, 'x')"] * 250)
    found = book.ledger.query(f"{COUNT.format(n=900)} SELECT {wide} FROM c", limit=1000)
    assert found.truncated
    assert len(json.dumps(found)) < 400_000
    numbers = ", ".join(["x * 1000000007"] * 250)
    found = book.ledger.query(f"{COUNT.format(n=900)} SELECT {numbers} FROM c", limit=1000)
    assert found.truncated
    assert len(json.dumps(found)) < 800_000
    assert psutil.Process().memory_info().rss - before < 20 * 2**20


def test_many_queries_run_beside_one_another_and_leave_a_few_processes_at_most(book: Book) -> None:
    def querying() -> set[psutil.Process]:
        return {c for c in psutil.Process().children() if "query_process.py" in " ".join(c.cmdline())}

    book.apply("France")
    others = querying()  # of ledgers that are open elsewhere in the process
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: book.ledger.query("SELECT id FROM edits", seconds=20), range(48)))
    assert all(answer.rows == [["e1"]] for answer in answers)
    children = querying() - others
    assert children
    assert len(children) <= AT_ONCE
    book.ledger.close()
    assert not any(child.is_running() for child in children)


def test_a_process_that_was_killed_is_an_error_of_one_query(book: Book) -> None:
    book.ledger.query("SELECT 1")
    (process,) = book.ledger._queries._idle
    assert process is not None
    process.kill()
    process.wait()
    assert book.ledger.query("SELECT 1").rows == [[1]]


def test_the_schema_names_every_table_and_explains_it(book: Book) -> None:
    schema = book.ledger.schema()
    for table in ("models", "patches", "edits", "events", "measurements", "drift", "jobs", "edits_fts"):
        assert f" {table} " in schema
    assert "-- one call of apply is one patch" in schema
    assert "edits_fts_data" not in schema
    for line in schema.splitlines():
        if line.startswith("--   SELECT"):
            book.ledger.query(line[2:])


def test_a_view_that_somebody_added_can_do_no_more_than_a_query(home: Path) -> None:
    with Ledger.open(home):
        pass
    conn = sqlite3.connect(home / "ledger.db", isolation_level=None)
    conn.execute("CREATE VIEW trap AS SELECT load_extension('/tmp/evil.so') AS x, edit('x') AS y")
    conn.close()
    with (
        Ledger.open(home, read_only=True) as ledger,
        pytest.raises(QueryError, match=r"unsafe use|no such function|authoriz"),
    ):
        ledger.query("SELECT * FROM trap")
