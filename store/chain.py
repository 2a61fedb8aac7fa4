"""The history: a chain of events, each hashed together with the hash of the event before it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from store.canonical import digest, dump_json, json_value, storable_text
from store.records import Problem, Who

HASHED = (
    "seq",
    "at",
    "kind",
    "model_id",
    "edit_ids",
    "client",
    "client_version",
    "request_id",
    "reason",
    "weights_hash",
    "state_hash",
    "payload",
)


def event_hash(prev_hash: str, fields: Mapping[str, Any]) -> str:
    """SHA-256 over the previous hash and the canonical JSON of the fields named in HASHED.

    `edit_ids` and `payload` are values here, not JSON texts.
    """
    return digest(prev_hash + dump_json({name: fields[name] for name in HASHED}))


def storable_or_none(text: str | None) -> str | None:
    """`storable_text` of a text; None stays None."""
    return None if text is None else storable_text(text)


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """An event that has no place in the chain yet."""

    kind: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    model_id: int | None = None
    edit_ids: Sequence[str] = ()
    reason: str | None = None
    weights_hash: str | None = None
    state_hash: str | None = None


def append_event(db: Database, new: NewEvent, who: Who, at: str) -> dict[str, Any]:
    """Add an event to the chain, inside the caller's transaction; returns its fields as JSON values."""
    last = db.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    fields: dict[str, Any] = {
        "seq": 1 if last is None else last["seq"] + 1,
        "at": at,
        "kind": storable_text(new.kind),
        "model_id": new.model_id,
        "edit_ids": json_value(new.edit_ids),
        "client": storable_or_none(who.client),
        "client_version": storable_or_none(who.client_version),
        "request_id": storable_or_none(who.request_id),
        "reason": storable_or_none(new.reason),
        "weights_hash": storable_or_none(new.weights_hash),
        "state_hash": storable_or_none(new.state_hash),
        "payload": json_value(
            new.payload if who.identity is None else {**new.payload, "identity": who.identity}
        ),
    }
    prev_hash = "" if last is None else last["hash"]
    hashed = event_hash(prev_hash, fields)
    stored = fields | {
        "edit_ids": dump_json(fields["edit_ids"]),
        "payload": dump_json(fields["payload"]),
    }
    columns, marks = ", ".join(HASHED), ", ".join("?" * len(HASHED))
    db.execute(
        f"INSERT INTO events ({columns}, prev_hash, hash) VALUES ({marks}, ?, ?)",
        [*(stored[name] for name in HASHED), prev_hash, hashed],
    )
    return fields


def read_chain(rows: Iterable[Any], last_seq: int | None) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Check the chain: returns the events, with `edit_ids` and `payload` parsed, and every problem.

    `rows` are the rows of the events table in order. `last_seq` is the highest event number ever
    used; it shows whether events are missing at the end.
    """
    events: list[dict[str, Any]] = []
    problems: list[Problem] = []
    prev_hash, expected = "", 1
    for row in rows:
        event = dict(row)
        where = f"event {event['seq']}"
        if event["seq"] != expected:
            problems.append(Problem("chain", where, f"events {expected} to {event['seq'] - 1} are missing"))
        elif event["prev_hash"] != prev_hash:
            problems.append(Problem("chain", where, "its prev_hash is not the hash of the event before it"))
        try:
            event["edit_ids"], event["payload"] = json.loads(event["edit_ids"]), json.loads(event["payload"])
            events.append(event)
            intact = event_hash(event["prev_hash"], event) == event["hash"]
        except (ValueError, TypeError):
            intact = False
        if not intact:
            about = f" ({event['kind']}: {event['edit_ids']})"
            problems.append(
                Problem("chain", where, f"its content does not match its hash; it was altered{about}")
            )
        prev_hash, expected = event["hash"], event["seq"] + 1
    if last_seq is not None and last_seq >= expected:
        problems.append(Problem("chain", f"event {expected}", f"events {expected} to {last_seq} are missing"))
    return events, problems
