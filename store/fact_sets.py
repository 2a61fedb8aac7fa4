"""Fact sets: lists of right answers by name, in versions, and the verdict of each fact for each model."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlite_utils import Database

from store.canonical import dump_json, fact_key, json_value, now, parse_json, storable_text
from store.chain import NewEvent, append_event
from store.changes import insert
from store.connection import Connection
from store.errors import NoSuchSet
from store.history import differences
from store.records import NOBODY, FactRecord, FactSetRecord, FactState, Json, Problem, Who

SAVED = "facts_saved"
FACT_SET_EVENTS = frozenset({SAVED})
_STATE = tuple(
    name for name in FactState.__dataclass_fields__ if name not in ("set_name", "number", "model_id")
)


class FactSets(Connection):
    """The methods of the ledger for fact sets.

    Sets and facts follow from the events, as edits do. How a fact stands with a model (`FactState`) is working
    state like a job: it can be measured again, so it has no events.
    """

    def save_facts(
        self,
        name: str,
        version: int,
        about: Mapping[str, Any],
        put: Mapping[int, Mapping[str, Any]],
        removed: Sequence[int] = (),
        who: Who = NOBODY,
        reason: str | None = None,
    ) -> FactSetRecord:
        """Record a new version of a set, the first one of a new set included.

        Args:
            put: new and changed facts by their number in the set; each has at least subject, prompt and answer.
            removed: numbers of facts that are no longer in the set.
        """
        payload = {
            "set": storable_text(name),
            "version": version,
            "about": json_value(about),
            "put": [[number, json_value(fact)] for number, fact in sorted(put.items())],
            "removed": sorted(removed),
        }
        with self._write() as db:
            event = append_event(db, NewEvent(kind=SAVED, payload=payload, reason=reason), who, now())
            _follow(db, event)
        return self.fact_set(name)

    def fact_set(self, name: str) -> FactSetRecord:
        """A set by its name. Raises NoSuchSet."""
        row = self._row(f"{_SETS} WHERE s.name = ?", (storable_text(name),))
        if row is None:
            known = ", ".join(repr(other.name) for other in self.fact_sets()[:10])
            raise NoSuchSet(
                f"there is no fact set {name[:80]!r}; "
                + (f"there are {known}" if known else "there is none yet: save_facts makes one")
            )
        return _set_record(row)

    def fact_sets(self) -> list[FactSetRecord]:
        """All sets, sorted by name."""
        return [_set_record(row) for row in self._rows(f"{_SETS} ORDER BY s.name")]

    def facts_of(self, name: str) -> list[FactRecord]:
        """The facts of a set, by number."""
        rows = self._rows(
            "SELECT * FROM set_facts WHERE set_name = ? ORDER BY number", (storable_text(name),)
        )
        return [
            FactRecord(row["set_name"], row["number"], row["key"], row["since"], parse_json(row["fact"], {}))
            for row in rows
        ]

    def fact_states(self, name: str, model_id: int) -> dict[int, FactState]:
        """How the facts of a set stand with a model, by number; facts without a state are missing."""
        rows = self._rows(
            "SELECT * FROM fact_states WHERE set_name = ? AND model_id = ? ORDER BY number",
            (storable_text(name), model_id),
        )
        return {row["number"]: FactState(**dict(row)) for row in rows}

    def put_fact_states(self, name: str, model_id: int, changes: Mapping[int, Mapping[str, Any]]) -> None:
        """Update the states of facts, by number; columns that are left out stay as they are."""
        name = storable_text(name)
        with self._write() as db:
            for number, values in changes.items():
                db.execute(
                    "INSERT INTO fact_states (set_name, number, model_id) VALUES (?, ?, ?)"
                    " ON CONFLICT DO NOTHING",
                    [name, number, model_id],
                )
                columns = [column for column in _STATE if column in values]
                sets = ", ".join(f"{column} = ?" for column in columns)
                db.execute(
                    f"UPDATE fact_states SET {sets} WHERE set_name = ? AND number = ? AND model_id = ?",
                    [*(_storable(values[column]) for column in columns), name, number, model_id],
                )

    def edits_of_sets(self, model_id: int) -> set[str]:
        """Ids of the edits that were made to correct a fact of a set."""
        rows = self._rows(
            "SELECT DISTINCT edit_id FROM fact_states WHERE model_id = ? AND edit_id IS NOT NULL", (model_id,)
        )
        return {row["edit_id"] for row in rows}


_SETS = "SELECT s.*, (SELECT count(*) FROM set_facts f WHERE f.set_name = s.name) AS facts FROM fact_sets s"


def _storable(value: Any) -> Any:
    return storable_text(value) if isinstance(value, str) else value


def set_row(event: Mapping[str, Any], created: str) -> Json:
    """The row of `fact_sets` after a facts_saved event."""
    payload = event["payload"]
    return {
        "name": payload["set"],
        "version": payload["version"],
        "about": dump_json(payload["about"]),
        "event_seq": event["seq"],
        "created": created,
        "changed": event["at"],
    }


def fact_rows(event: Mapping[str, Any]) -> Iterator[Json]:
    """The rows of `set_facts` that a facts_saved event puts."""
    payload = event["payload"]
    for number, fact in payload["put"]:
        yield {
            "set_name": payload["set"],
            "number": number,
            "key": fact_key(fact["subject"], fact["prompt"]),
            "since": payload["version"],
            "fact": dump_json(fact),
        }


def _follow(db: Database, event: Mapping[str, Any]) -> None:
    """Bring the tables to what an event says, inside its transaction."""
    name = event["payload"]["set"]
    old = db.execute("SELECT created FROM fact_sets WHERE name = ?", [name]).fetchone()
    row = set_row(event, old["created"] if old else event["at"])
    if old is None:
        insert(db, "fact_sets", row)
    else:
        sets = ", ".join(f"{column} = ?" for column in row)
        db.execute(f"UPDATE fact_sets SET {sets} WHERE name = ?", [*row.values(), name])
    for number in event["payload"]["removed"]:
        db.execute("DELETE FROM set_facts WHERE set_name = ? AND number = ?", [name, number])
        db.execute("DELETE FROM fact_states WHERE set_name = ? AND number = ?", [name, number])
    for fact in fact_rows(event):
        db.execute("DELETE FROM set_facts WHERE set_name = ? AND number = ?", [name, fact["number"]])
        db.execute(  # the verdict was about another answer; the id of the correcting edit stays
            "UPDATE fact_states SET verdict = NULL, was = NULL, state_hash = NULL, outcome = NULL, why = NULL"
            " WHERE set_name = ? AND number = ?",
            [name, fact["number"]],
        )
        insert(db, "set_facts", fact)


def check_fact_sets(
    sets: Iterable[Mapping[str, Any]], facts: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[Problem]:
    """Compare the rows of `fact_sets` and `set_facts` with the events; yields every problem."""
    expected_sets: dict[str, Json] = {}
    expected: dict[tuple[str, int], Json] = {}
    for event in events:
        if event["kind"] != SAVED:
            continue
        try:
            name = event["payload"]["set"]
            created = expected_sets[name]["created"] if name in expected_sets else event["at"]
            expected_sets[name] = set_row(event, created)
            for number in event["payload"]["removed"]:
                expected.pop((name, number), None)
            expected |= {(name, row["number"]): row for row in fact_rows(event)}
        except (KeyError, TypeError, ValueError) as error:
            yield Problem("chain", f"event {event['seq']}", f"does not describe a fact set ({error!r})")
    yield from _compare("fact set", expected_sets, {row["name"]: row for row in sets})
    yield from _compare("fact", expected, {(row["set_name"], row["number"]): row for row in facts})


def _compare(
    what: str, expected: Mapping[Any, Json], present: Mapping[Any, Mapping[str, Any]]
) -> Iterator[Problem]:
    for key in sorted(expected.keys() | present.keys(), key=str):
        where = f"{what} {key}"
        if key not in present:
            yield Problem("row", where, "is missing, but it is in the events")
        elif key not in expected:
            yield Problem("row", where, "is not in any event")
        elif different := differences(expected[key], present[key]):
            yield Problem("row", where, "was altered: " + "; ".join(different))


def _set_record(row: sqlite3.Row) -> FactSetRecord:
    return FactSetRecord(
        name=row["name"],
        version=row["version"],
        about=parse_json(row["about"], {}),
        facts=row["facts"],
        created=row["created"],
        changed=row["changed"],
    )
