"""Searching edits: filters, full text, pages."""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Any

from store.canonical import canonical_json, digest, storable_text, utc_text, without_case_and_spacing
from store.errors import BadFilter
from store.records import STATUSES, EditRecord

MAX_LIMIT = 200
_MAX_TEXT = 1_000
_MAX_WORDS = 50
_FIELDS = ("subject", "prompt", "target", "reason")

Rows = Callable[[str, list[Any]], list[sqlite3.Row]]


@dataclass(frozen=True)
class EditFilter:
    """Which edits to list. A field that is None does not filter.

    `subject`: case and spacing do not matter. `text`: every word must begin a word of the subject,
    prompt, target or reason. `since`: ISO 8601 date or time (UTC unless it has a zone); edits made
    then or later.
    """

    model_id: int | None = None
    status: str | None = None
    subject: str | None = None
    text: str | None = None
    method: str | None = None
    since: str | None = None


@dataclass(frozen=True)
class Page:
    """One page of the result, newest first; `total` counts all pages."""

    edits: list[EditRecord]
    next_cursor: str | None
    total: int


def find_edits(
    rows: Rows,
    select: str,
    record: Callable[[sqlite3.Row], EditRecord],
    wanted: EditFilter,
    limit: int,
    cursor: str | None,
) -> Page:
    """Run a search. `select` is the start of the query; `rows` runs SQL. Raises BadFilter."""
    if not 1 <= limit <= MAX_LIMIT:
        raise BadFilter(f"limit {limit} is out of range; it goes from 1 to {MAX_LIMIT}")
    before = _read_cursor(cursor, wanted)
    conditions, params, total = _conditions(rows, wanted)
    if before is not None:
        conditions, params = [*conditions, "e.seq < ?"], [*params, before]
    matches = rows(f"{select}{_where(conditions)} ORDER BY e.seq DESC LIMIT ?", [*params, limit + 1])
    edits = [record(row) for row in matches[:limit]]
    return Page(edits, _cursor(edits[-1].seq, wanted) if len(matches) > limit else None, total)


def conditions_of(rows: Rows, wanted: EditFilter) -> tuple[list[str], list[Any]]:
    """The SQL conditions on `edits e`, and their parameters. Raises BadFilter."""
    conditions, params, _ = _conditions(rows, wanted)
    return conditions, params


def _conditions(rows: Rows, wanted: EditFilter) -> tuple[list[str], list[Any], int]:
    """The SQL conditions, their parameters, and how many edits match."""
    conditions, params = _field_conditions(wanted)
    if wanted.text is None or not wanted.text.strip():
        return conditions, params, _count(rows, conditions, params)
    if len(wanted.text) > _MAX_TEXT:
        raise BadFilter(f"text has {len(wanted.text):,} characters; search for at most {_MAX_TEXT:,}")
    attempts = [([*conditions, _CONTAINED], [*params, *[_like(wanted.text)] * len(_FIELDS)])]
    if match := fts_query(wanted.text):
        attempts.insert(0, ([*conditions, _MATCHED], [*params, match]))
    total = 0
    for conditions, params in attempts:  # first by words; if nothing matches, by the text as a substring
        total = _count(rows, conditions, params)
        if total:
            break
    return conditions, params, total


_MATCHED = "e.seq IN (SELECT rowid FROM edits_fts WHERE edits_fts MATCH ?)"
_CONTAINED = "(" + " OR ".join(f"e.{field} LIKE ? ESCAPE '!'" for field in _FIELDS) + ")"


def _field_conditions(wanted: EditFilter) -> tuple[list[str], list[Any]]:
    if wanted.status is not None and wanted.status not in STATUSES:
        raise BadFilter(f"status {wanted.status!r} does not exist; use one of {', '.join(STATUSES)}")
    values = {
        "e.model_id = ?": wanted.model_id,
        "e.status = ?": wanted.status,
        "e.subject_key = ?": None if wanted.subject is None else without_case_and_spacing(wanted.subject),
        "e.method = ?": None if wanted.method is None else storable_text(wanted.method),
        "e.created >= ?": None if wanted.since is None else _since(wanted.since),
    }
    given = {condition: value for condition, value in values.items() if value is not None}
    return list(given), list(given.values())


def _since(text: str) -> str:
    try:
        return utc_text(datetime.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        raise BadFilter(
            f"since {text[:80]!r} is not an ISO 8601 date or time; write 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None


def _where(conditions: list[str]) -> str:
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


def _count(rows: Rows, conditions: list[str], params: list[Any]) -> int:
    return int(rows(f"SELECT count(*) AS n FROM edits e{_where(conditions)}", params)[0]["n"])


def fts_query(text: str) -> str:
    """An FTS5 query for any text: each word is a quoted prefix, and all are required."""
    words = ["".join(c if c.isalnum() else " " for c in word).split() for word in storable_text(text).split()]
    phrases = [" ".join(parts) for parts in words if parts]
    return " ".join(f'"{phrase}"*' for phrase in phrases[:_MAX_WORDS])


def _like(text: str) -> str:
    escaped = storable_text(text.strip()).replace("!", "!!").replace("%", "!%").replace("_", "!_")
    return f"%{escaped}%"


def _fingerprint(wanted: EditFilter) -> str:
    return digest(canonical_json(astuple(wanted)))[:12]


def _cursor(seq: int, wanted: EditFilter) -> str:
    return base64.urlsafe_b64encode(json.dumps([seq, _fingerprint(wanted)]).encode()).decode()


def _read_cursor(cursor: str | None, wanted: EditFilter) -> int | None:
    if cursor is None:
        return None
    try:
        seq, fingerprint = json.loads(base64.urlsafe_b64decode(cursor.encode("ascii")))
        if not isinstance(seq, int) or not 0 < seq < 2**62:
            raise ValueError
    except (ValueError, TypeError, binascii.Error):
        raise BadFilter(
            f"cursor {cursor[:80]!r} was not returned by this ledger; leave it out to start with the first page"
        ) from None
    if fingerprint != _fingerprint(wanted):
        raise BadFilter("the cursor belongs to a search with other filters; repeat those, or leave it out")
    return seq
