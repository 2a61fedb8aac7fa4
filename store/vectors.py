"""Steering vectors that were made: which there are, and the files that hold them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from store.canonical import canonical_json, clean, now, parsed, plain
from store.chain import NewEvent, append_event
from store.changes import insert
from store.connection import Connection
from store.errors import LedgerError, LedgerReadOnly, WrongState
from store.history import differences
from store.records import NOBODY, Json, Problem, VectorRecord, Who

CREATED, DELETED = "vector_created", "vector_deleted"
VECTOR_EVENTS = frozenset({CREATED, DELETED})


class Vectors(Connection):
    """The steering vectors of the ledger. Like edits, they follow from the events."""

    def record_vector(
        self,
        model_id: int,
        name: str,
        data: bytes,
        about: Mapping[str, Any],
        who: Who = NOBODY,
        reason: str | None = None,
    ) -> VectorRecord:
        """Keep a vector: its file, and what is known of it (`about`, with its `method`).

        Raises WrongState when the model has one of this name already.
        """
        if self.read_only:
            raise LedgerReadOnly(f"the ledger {self.path} is open read-only; nothing was recorded")
        try:
            blob = self.blobs.put(data)
        except OSError as error:
            raise LedgerError(
                f"{self.blobs.folder} cannot be written: {error}; nothing was recorded"
            ) from error
        with self._write() as db:
            if self._find(model_id, name) is not None:
                raise WrongState(f"there is a steering vector {name!r} already")
            payload = {"name": clean(name), "blob": blob, "about": plain(about)}
            new = NewEvent(kind=CREATED, payload=payload, model_id=model_id, reason=reason)
            insert(db, "vectors", vector_row(append_event(db, new, who, now())))
        found = self.find_vector(model_id, name)
        assert found is not None
        return found

    def remove_vector(self, model_id: int, name: str, who: Who = NOBODY, reason: str | None = None) -> None:
        """Forget a vector; its file stays, for the history. Raises WrongState when there is none."""
        with self._write() as db:
            if self._find(model_id, name) is None:
                raise WrongState(f"there is no steering vector {name!r}")
            new = NewEvent(kind=DELETED, payload={"name": clean(name)}, model_id=model_id, reason=reason)
            append_event(db, new, who, now())
            db.execute("DELETE FROM vectors WHERE model_id = ? AND name = ?", [model_id, clean(name)])

    def find_vector(self, model_id: int, name: str) -> VectorRecord | None:
        """The vector of this name, None when there is none."""
        row = self._find(model_id, name)
        return None if row is None else _record(row)

    def vectors(self, model_id: int) -> list[VectorRecord]:
        """Every vector of a model, by name."""
        rows = self._rows("SELECT * FROM vectors WHERE model_id = ? ORDER BY name", (model_id,))
        return [_record(row) for row in rows]

    def _find(self, model_id: int, name: str) -> sqlite3.Row | None:
        return self._row("SELECT * FROM vectors WHERE model_id = ? AND name = ?", (model_id, clean(name)))


def vector_row(event: Mapping[str, Any]) -> Json:
    """The row of `vectors` a creating event brings."""
    payload = event["payload"]
    return {
        "model_id": event["model_id"],
        "name": payload["name"],
        "method": payload["about"]["method"],
        "blob": payload["blob"],
        "about": canonical_json(payload["about"]),
        "reason": event["reason"],
        "client": event["client"],
        "event_seq": event["seq"],
        "created": event["at"],
    }


def check_vectors(
    rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[Problem]:
    """Whether the rows of `vectors` are those the events lead to."""
    expected: dict[tuple[Any, str], Json] = {}
    for event in events:
        try:
            if event["kind"] == CREATED:
                expected[event["model_id"], event["payload"]["name"]] = vector_row(event)
            elif event["kind"] == DELETED:
                expected.pop((event["model_id"], event["payload"]["name"]), None)
        except (KeyError, TypeError) as error:
            yield Problem("chain", f"event {event['seq']}", f"does not tell of a vector ({error!r})")
    for row in rows:
        wanted = expected.pop((row["model_id"], row["name"]), None)
        if wanted is None:
            yield Problem("row", f"vector {row['name']}", "is told of by no event")
        elif different := differences(wanted, row):
            yield Problem("row", f"vector {row['name']}", "was altered: " + "; ".join(different))
    for _, name in expected:
        yield Problem("row", f"vector {name}", "is gone from vectors, though the events tell of it")


def _record(row: sqlite3.Row) -> VectorRecord:
    return VectorRecord(
        name=row["name"],
        model_id=row["model_id"],
        method=row["method"],
        blob=row["blob"],
        about=parsed(row["about"], {}),
        reason=row["reason"],
        client=row["client"],
        created=row["created"],
    )
