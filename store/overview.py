"""The facts of a ledger as a person wants to see them: what needs attention first, by pages, quickly.

A small table in memory has the columns by which the pages are sorted and counted. It follows the events,
so that a page of ten thousand edits costs as much as one of ten.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from store.errors import BadFilter, DamagedLedger
from store.ledger import Ledger
from store.records import Json
from store.search import EditFilter, conditions_of

HOLDS = ("no", "partly", "unknown", "yes", "off")
"""Whether a fact holds, by its last measurement; `unknown`: never measured; `off`: not active."""
SORTS = {
    "attention": "i.attention DESC, i.seq DESC",
    "newest": "i.seq DESC",
    "oldest": "i.seq",
    "subject": "e.subject_key, i.seq DESC",
    "changed": "e.changed DESC, i.seq DESC",
}
MOST_ON_A_PAGE = 200
_CHUNK = 500  # edits brought up to date in one statement

_INDEX = """
CREATE TEMP TABLE fact_index (
  seq INTEGER PRIMARY KEY, id TEXT UNIQUE, model_id INTEGER, status TEXT, batch INTEGER, method TEXT, holds TEXT,
  attention INTEGER
)"""
_MEANS = """
CREATE TEMP TABLE event_means (
  seq INTEGER PRIMARY KEY, model_id INTEGER, at TEXT, said REAL, other_subjects REAL, other_facts REAL, n INTEGER
)"""
_FILL_MEANS = """
INSERT INTO temp.event_means
SELECT m.event_seq, v.model_id, m.at, avg(m.reliability), avg(m.locality),
  avg(json_extract(m.measured, '$.subject_locality')), count(*)
FROM main.measurements m JOIN main.events v ON v.seq = m.event_seq
WHERE v.kind <> 'rejected' AND m.event_seq > (SELECT coalesce(max(seq), 0) FROM temp.event_means)
GROUP BY m.event_seq"""
_SORTED = "CREATE INDEX temp.fact_index_sorted ON fact_index(attention, seq)"
_FILL = """
INSERT OR REPLACE INTO temp.fact_index
SELECT e.seq, e.id, e.model_id, e.status, e.patch_id, e.method,
  CASE WHEN e.status <> 'active' THEN 'off' ELSE coalesce(f.holds, 'unknown') END,
  CASE
    WHEN f.holds = 'no' THEN 90
    WHEN f.holds = 'partly' THEN 70
    WHEN e.status = 'active' AND f.holds IS NULL THEN 60
    WHEN e.status = 'rejected' AND NOT EXISTS (
      SELECT 1 FROM main.edits o WHERE o.fact_key = e.fact_key AND o.model_id = e.model_id
      AND (o.status = 'active' OR o.seq > e.seq)) THEN 50
    WHEN e.status = 'active' THEN 20
    ELSE 10 END
FROM main.edits e JOIN main.facts f ON f.edit_id = e.id"""

# What was corrected for the set, and every other correction of a fact that is in it.
_IN_SET = """i.seq IN (WITH w(name) AS (SELECT ?)
  SELECT o.seq FROM w JOIN main.set_facts s ON s.set_name = w.name JOIN main.edits o ON o.fact_key = s.key
  UNION SELECT o.seq FROM w JOIN main.fact_states t ON t.set_name = w.name JOIN main.edits o ON o.id = t.edit_id)"""


@dataclass(frozen=True)
class FactFilter:
    """Which facts to show. A field that is None does not filter."""

    text: str | None = None
    subject: str | None = None
    status: str | None = None
    method: str | None = None
    batch: int | None = None
    fact_set: str | None = None
    holds: str | None = None
    model_id: int | None = None
    since: str | None = None


@dataclass(frozen=True)
class FactPage:
    """One page of facts, each a row of the view `facts` with its `attention`."""

    facts: list[Json]
    total: int
    page: int
    pages: int


class Overview:
    """Reads one ledger through a connection of its own, so that it waits for no one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._mutex = threading.Lock()
        self._conn: sqlite3.Connection | None = None
        self._uri = ""
        self._seen = self._means_seen = -1
        self._kept: dict[str, dict[int, int]] = {}

    def close(self) -> None:
        """Close the connection; the next question opens it anew."""
        with self._mutex:
            if self._conn is not None:
                self._conn.close()
            self._conn, self._seen = None, -1

    def page(self, wanted: FactFilter, sort: str = "attention", page: int = 1, size: int = 25) -> FactPage:
        """A page of facts. Raises BadFilter for a value that cannot be used."""
        if sort not in SORTS:
            raise BadFilter(f"sort {sort[:80]!r} does not exist; use one of {', '.join(SORTS)}")
        if not 1 <= size <= MOST_ON_A_PAGE:
            raise BadFilter(f"size {size} is out of range; it goes from 1 to {MOST_ON_A_PAGE}")
        with self._mutex:
            where, params = self._where(wanted)
            joined = "FROM temp.fact_index i JOIN main.edits e ON e.seq = i.seq"
            needs_edits = any(name in where for name in ("e.", "edits_fts"))
            counted = joined if needs_edits else "FROM temp.fact_index i"
            total = int(self._all(f"SELECT count(*) {counted} {where}", params)[0][0])
            pages = max(1, -(-total // size))
            page = min(max(1, page), pages)
            ids = self._all(
                f"SELECT i.id, i.attention {joined if needs_edits or 'e.' in SORTS[sort] else counted} {where}"
                f" ORDER BY {SORTS[sort]} LIMIT ? OFFSET ?",
                [*params, size, (page - 1) * size],
            )
            return FactPage(self._facts({row[0]: row[1] for row in ids}), total, page, pages)

    def counts(self, model_id: int | None = None) -> dict[str, int]:
        """How many facts there are by whether they hold, `off` split by status; and `all` of them."""
        with self._mutex:
            where, params = ("WHERE model_id = ?", [model_id]) if model_id is not None else ("", [])
            rows = self._all(
                "SELECT CASE holds WHEN 'off' THEN status ELSE holds END, count(*)"
                f" FROM temp.fact_index {where} GROUP BY 1",
                params,
            )
        counts = {row[0]: int(row[1]) for row in rows}
        return counts | {"all": sum(counts.values())}

    def methods(self) -> list[str]:
        """The methods that facts were corrected with."""
        with self._mutex:
            return [row[0] for row in self._all("SELECT DISTINCT method FROM temp.fact_index ORDER BY 1", [])]

    def fact_sets(self) -> list[str]:
        """The names of the fact sets."""
        with self._mutex:
            return [row[0] for row in self._all("SELECT name FROM main.fact_sets ORDER BY name", [])]

    def fact(self, edit_id: str) -> Json | None:
        """One row of the view `facts`; None if there is none of this id."""
        with self._mutex:
            rows = self._all("SELECT * FROM main.facts WHERE edit_id = ?", [edit_id])
            return dict(rows[0]) if rows else None

    def means(self, model_id: int | None = None) -> list[Json]:
        """The mean rates of every event in which something was measured, oldest first."""
        with self._mutex:
            conn = self._follow()
            if self._means_seen != self._seen:
                conn.execute(_FILL_MEANS)
                conn.commit()
                self._means_seen = self._seen
            rows = self._all(
                "SELECT * FROM temp.event_means WHERE (?1 IS NULL OR model_id = ?1) ORDER BY seq", [model_id]
            )
            return [dict(row) for row in rows]

    def rows(self, sql: str, params: Sequence[Any] = ()) -> list[Json]:
        """Rows of a fixed statement over the ledger and `temp.fact_index`."""
        with self._mutex:
            return [dict(row) for row in self._all(sql, list(params))]

    def kept(
        self, name: str, wanted: Sequence[int], find: Callable[[Sequence[int]], dict[int, int]]
    ) -> dict[int, int]:
        """A cache of values that never change, by number; `find` computes the missing ones."""
        known = self._kept.setdefault(name, {})
        if missing := [number for number in wanted if number not in known]:
            known |= find(missing)
        return {number: known[number] for number in wanted}

    def _facts(self, attention: dict[str, int]) -> list[Json]:
        marks = ", ".join("?" * len(attention))
        rows = self._all(f"SELECT * FROM main.facts WHERE edit_id IN ({marks})", list(attention))
        found = {row["edit_id"]: dict(row) for row in rows}
        return [found[edit_id] | {"attention": level} for edit_id, level in attention.items()]

    def _where(self, wanted: FactFilter) -> tuple[str, list[Any]]:
        if wanted.holds is not None and wanted.holds not in HOLDS:
            raise BadFilter(f"holds {wanted.holds[:80]!r} does not exist; use one of {', '.join(HOLDS)}")
        edits = EditFilter(subject=wanted.subject, text=wanted.text, since=wanted.since, status=wanted.status)
        conditions, params = conditions_of(lambda sql, values: self._all(sql, values), edits)
        own = {
            "i.model_id = ?": wanted.model_id,
            "i.method = ?": wanted.method,
            "i.batch = ?": wanted.batch,
            _IN_SET: wanted.fact_set,
            "i.holds = ?": wanted.holds,
        }
        given = {condition: value for condition, value in own.items() if value is not None}
        conditions, params = [*conditions, *given], [*params, *given.values()]
        return (f"WHERE {' AND '.join(conditions)}" if conditions else ""), params

    def _all(self, sql: str, params: list[Any]) -> list[sqlite3.Row]:
        try:
            conn = self._follow()
            rows: list[sqlite3.Row] = conn.execute(sql, params).fetchall()
            return rows
        except sqlite3.Error as error:
            raise DamagedLedger(f"the ledger {self._ledger.path} could not be read: {error}") from error

    def _follow(self) -> sqlite3.Connection:
        """The connection, with the index brought up to the last event."""
        uri = self._ledger.uri
        if self._conn is None or uri != self._uri:
            if self._conn is not None:
                self._conn.close()
            self._conn, self._uri, self._seen = _open(uri), uri, -1
        last = int(self._conn.execute("SELECT coalesce(max(seq), 0) FROM main.events").fetchone()[0])
        if last == self._seen:
            return self._conn
        if self._seen < 0 or last < self._seen:
            self._conn.execute("DELETE FROM temp.fact_index")
            self._conn.execute("DELETE FROM temp.event_means")
            self._kept.clear()
            self._means_seen = -1
            self._conn.execute(_FILL)
        else:
            self._bring_up_to_date(self._conn)
        self._conn.commit()
        self._seen = last
        return self._conn

    def _bring_up_to_date(self, conn: sqlite3.Connection) -> None:
        """Update the rows of edits that new events name, and of other edits of the same facts."""
        rows = conn.execute(
            "SELECT DISTINCT o.id FROM main.event_edits x JOIN main.edits e ON e.id = x.edit_id"
            " JOIN main.edits o ON o.fact_key = e.fact_key AND o.model_id = e.model_id WHERE x.seq > ?",
            [self._seen],
        ).fetchall()
        changed = [row[0] for row in rows]
        for start in range(0, len(changed), _CHUNK):
            chunk = changed[start : start + _CHUNK]
            conn.execute(f"{_FILL} WHERE e.id IN ({', '.join('?' * len(chunk))})", chunk)


def _open(uri: str) -> sqlite3.Connection:
    conn = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=10)
    conn.row_factory = sqlite3.Row
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    conn.execute("PRAGMA temp_store = MEMORY")
    conn.execute(_INDEX)
    conn.execute(_SORTED)
    conn.execute(_MEANS)
    return conn
