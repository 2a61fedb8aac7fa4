"""The steering vectors of a model, by name, and their files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlite_utils import Database

from store.canonical import dump_json, json_value, now, parse_json, storable_text
from store.chain import NewEvent, append_event
from store.changes import insert
from store.connection import Connection
from store.errors import WrongState
from store.history import differences
from store.records import NOBODY, Json, Problem, VectorRecord, Who

CREATED, DELETED = "vector_created", "vector_deleted"
VECTOR_EVENTS = frozenset({CREATED, DELETED})


class Vectors(Connection):
    """The methods of the ledger for steering vectors. Like edits, their rows follow from the events."""

    def record_vector(
        self,
        model_id: int,
        name: str,
        data: bytes,
        about: Mapping[str, Any],
        who: Who = NOBODY,
        reason: str | None = None,
        *,
        replace: bool = False,
    ) -> VectorRecord:
        """Record a vector: its file (`data`) and its properties (`about`, with its `method`).

        With `replace`, a vector of the same name is removed in the same transaction. Without it,
        raises WrongState if the model has one of this name. Raises LedgerError if nothing could be
        written; then nothing changed.
        """
        with self._new_files() as put:
            blob = put(data, {"vector": name, "about": about})
            with self._write() as db:
                if self._find(model_id, name) is not None:
                    if not replace:
                        raise WrongState(f"there is a steering vector {name!r} already")
                    _delete(db, model_id, name, who, "replaced by one of the same name")
                payload = {"name": storable_text(name), "blob": blob, "about": json_value(about)}
                new = NewEvent(kind=CREATED, payload=payload, model_id=model_id, reason=reason)
                insert(db, "vectors", vector_row(append_event(db, new, who, now())))
        vector = self.find_vector(model_id, name)
        assert vector is not None
        return vector

    def remove_vector(self, model_id: int, name: str, who: Who = NOBODY, reason: str | None = None) -> None:
        """Remove a vector; its file stays, for the history. Raises WrongState if there is none."""
        with self._write() as db:
            if self._find(model_id, name) is None:
                raise WrongState(f"there is no steering vector {name!r}")
            _delete(db, model_id, name, who, reason)

    def find_vector(self, model_id: int, name: str) -> VectorRecord | None:
        """The vector of this name, or None."""
        row = self._find(model_id, name)
        return None if row is None else _record(row)

    def vectors(self, model_id: int) -> list[VectorRecord]:
        """All vectors of a model, sorted by name."""
        rows = self._rows("SELECT * FROM vectors WHERE model_id = ? ORDER BY name", (model_id,))
        return [_record(row) for row in rows]

    def _find(self, model_id: int, name: str) -> sqlite3.Row | None:
        return self._row(
            "SELECT * FROM vectors WHERE model_id = ? AND name = ?", (model_id, storable_text(name))
        )


def _delete(db: Database, model_id: int, name: str, who: Who, reason: str | None) -> None:
    new = NewEvent(kind=DELETED, payload={"name": storable_text(name)}, model_id=model_id, reason=reason)
    append_event(db, new, who, now())
    db.execute("DELETE FROM vectors WHERE model_id = ? AND name = ?", [model_id, storable_text(name)])


def vector_row(event: Mapping[str, Any]) -> Json:
    """The row of `vectors` that a vector_created event adds."""
    payload = event["payload"]
    return {
        "model_id": event["model_id"],
        "name": payload["name"],
        "method": payload["about"]["method"],
        "blob": payload["blob"],
        "about": dump_json(payload["about"]),
        "reason": event["reason"],
        "client": event["client"],
        "event_seq": event["seq"],
        "created": event["at"],
    }


def check_vectors(
    rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[Problem]:
    """Compare the rows of `vectors` with the events; yields every problem."""
    expected: dict[tuple[Any, str], Json] = {}
    for event in events:
        try:
            if event["kind"] == CREATED:
                expected[event["model_id"], event["payload"]["name"]] = vector_row(event)
            elif event["kind"] == DELETED:
                expected.pop((event["model_id"], event["payload"]["name"]), None)
        except (KeyError, TypeError) as error:
            yield Problem("chain", f"event {event['seq']}", f"does not describe a vector ({error!r})")
    for row in rows:
        created = expected.pop((row["model_id"], row["name"]), None)
        if created is None:
            yield Problem("row", f"vector {row['name']}", "is not in any event")
        elif different := differences(created, row):
            yield Problem("row", f"vector {row['name']}", "was altered: " + "; ".join(different))
    for _, name in expected:
        yield Problem("row", f"vector {name}", "is missing from vectors, but it is in the events")


def _record(row: sqlite3.Row) -> VectorRecord:
    return VectorRecord(
        name=row["name"],
        model_id=row["model_id"],
        method=row["method"],
        blob=row["blob"],
        about=parse_json(row["about"], {}),
        reason=row["reason"],
        client=row["client"],
        created=row["created"],
    )
