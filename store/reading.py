"""The methods that read the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from store.canonical import fact_key, parse_json, storable_text
from store.chain import read_chain
from store.connection import Connection
from store.errors import NoSuchEdit
from store.records import (
    RATES,
    EditRecord,
    EventRecord,
    Json,
    MeasurementRecord,
    ModelRecord,
    PatchRecord,
    StackEntry,
)
from store.search import EditFilter, Page, find_edits

EDITS = f"""SELECT e.*, {", ".join(f"m.{rate}" for rate in RATES)} FROM edits e
LEFT JOIN measurements m ON m.id = (SELECT max(id) FROM measurements WHERE edit_id = e.id)"""
_CHUNK = 500  # ids in one query
_PRISTINE = """SELECT m.edit_id, m.measured FROM measurements m
JOIN events e ON e.seq = m.event_seq JOIN edits d ON d.id = m.edit_id JOIN patches p ON p.id = d.patch_id
WHERE m.edit_id IN ({}) AND (json_extract(m.measured, '$.before_of') = ?
  OR (m.occasion = 'apply' AND p.weights_hash_before = ? AND coalesce(
    (SELECT coalesce(s.state_hash, '') FROM events s WHERE s.model_id = e.model_id AND s.seq < e.seq
      AND s.weights_hash IS NOT NULL ORDER BY s.seq DESC LIMIT 1), ?) = ?))
ORDER BY m.id"""


class ReadingMethods(Connection):
    """The methods of the ledger that read edits, patches, events and measurements."""

    _active: tuple[tuple[int, int], list[EditRecord]] | None = None  # at a position, of a model: read last

    def stack(self, model_id: int) -> list[StackEntry]:
        """The patches that a replay adds to the pristine weights, in ledger order."""
        rows = self._rows(
            "SELECT p.*, e.id AS edit_id, e.row AS edit_row, e.status"
            " FROM patches p JOIN edits e ON e.patch_id = p.id"
            " WHERE p.id IN (SELECT patch_id FROM edits WHERE model_id = ? AND status = 'active')"
            " ORDER BY p.position, e.row",
            (model_id,),
        )
        groups: dict[int, list[sqlite3.Row]] = {}
        for row in rows:
            groups.setdefault(row["id"], []).append(row)
        return [_stack_entry(group) for group in groups.values()]

    def expected_weights_hash(self, model_id: int) -> str | None:
        """What the live weights must hash to after a replay; None before the first edit."""
        return self._last_state(model_id, "weights_hash")

    def expected_state_hash(self, model_id: int) -> str | None:
        """The state hash recorded with the last change; None if none was recorded."""
        return self._last_state(model_id, "state_hash")

    def active_edits(self, model_id: int) -> list[EditRecord]:
        """All active edits, oldest first. They are read once at each position: one call asks for them several times."""
        key = self.position(), model_id
        read = self._active
        if read is None or read[0] != key:
            found = self._edits("WHERE e.model_id = ? AND e.status = 'active' ORDER BY e.seq", (model_id,))
            self._active = read = key, found
        return list(read[1])

    def get_edit(self, edit_id: str) -> EditRecord:
        """One edit. Raises NoSuchEdit."""
        return self.edits([edit_id])[0]

    def position(self) -> int:
        """The number of the latest event: two reads at the same position give the same."""
        return self._last_event()

    def edits(self, edit_ids: Sequence[str]) -> list[EditRecord]:
        """Edits in the order of `edit_ids`. Raises NoSuchEdit, naming those that do not exist."""
        records: dict[str, EditRecord] = {}
        for start in range(0, len(edit_ids), _CHUNK):
            chunk = [storable_text(edit_id) for edit_id in edit_ids[start : start + _CHUNK]]
            marks = ", ".join("?" * len(chunk))
            records |= {edit.id: edit for edit in self._edits(f"WHERE e.id IN ({marks})", chunk)}
        missing = [edit_id for edit_id in edit_ids if edit_id not in records]
        if missing:
            last = self._row("SELECT max(seq) AS seq FROM edits")
            newest = f"the newest is 'e{last['seq']}'" if last and last["seq"] else "the ledger is empty"
            shown = ", ".join(repr(edit_id[:80]) for edit_id in missing[:10])
            raise NoSuchEdit(f"no edit has the id {shown}; {newest}")
        return [records[edit_id] for edit_id in edit_ids]

    def list_edits(
        self, wanted: EditFilter | None = None, limit: int = 20, cursor: str | None = None
    ) -> Page:
        """A page of edits, newest first. Raises BadFilter for a value that cannot be used."""
        with self._snapshot():
            return find_edits(self._rows, EDITS, edit_record, wanted or EditFilter(), limit, cursor)

    def find_active(self, model_id: int, subject: str, prompt: str) -> list[EditRecord]:
        """Active edits of the same subject and prompt, without regard to case and spacing."""
        where = "WHERE e.fact_key = ? AND e.model_id = ? AND e.status = 'active' ORDER BY e.seq"
        return self._edits(where, (fact_key(subject, prompt), model_id))

    def edits_with(self, field: str, model_id: int) -> list[EditRecord]:
        """Edits of a model, of any status, whose request has this field beside what was asked; oldest first."""
        where = "WHERE e.model_id = ? AND json_extract(e.request, ?) IS NOT NULL ORDER BY e.seq"
        return self._edits(where, (model_id, f"$.{field}"))

    def batch(self, patch_id: int) -> list[str]:
        """Ids of the edits of one call, by row."""
        return [
            row["id"]
            for row in self._rows("SELECT id FROM edits WHERE patch_id = ? ORDER BY row", (patch_id,))
        ]

    def replaced_edits(self, edit_id: str) -> list[str]:
        """Ids of the edits that this one replaced."""
        return [
            row["id"]
            for row in self._rows("SELECT id FROM edits WHERE replaced_by = ? ORDER BY seq", (edit_id,))
        ]

    def computed_on_top(self, edit_ids: Sequence[str]) -> list[str]:
        """Active edits that were computed while one of `edit_ids` was in the weights, without those themselves."""
        times = [span for edit_id in edit_ids for span in self._times_active(edit_id)]
        models = {edit.model_id for edit in self.edits(edit_ids)}
        rows = self._rows(
            "SELECT e.id, e.model_id, p.event_seq FROM edits e JOIN patches p ON p.id = e.patch_id"
            " WHERE e.status = 'active' ORDER BY e.seq"
        )
        return [
            row["id"]
            for row in rows
            if row["id"] not in edit_ids
            and row["model_id"] in models
            and any(start < row["event_seq"] < end for start, end in times)
        ]

    def get_patch(self, patch_id: int) -> PatchRecord:
        """One patch. Raises NoSuchEdit."""
        row = self._row("SELECT * FROM patches WHERE id = ?", (patch_id,))
        if row is None:
            raise NoSuchEdit(f"no patch has the id {patch_id}")
        values = {name: row[name] for name in PatchRecord.__dataclass_fields__}
        return PatchRecord(
            **values
            | {"params": parse_json(row["params"], {}), "environment": parse_json(row["environment"], {})}
        )

    def events_of(self, edit_id: str) -> list[EventRecord]:
        """The events about one edit, oldest first."""
        sql = (
            "SELECT v.* FROM event_edits x JOIN events v ON v.seq = x.seq WHERE x.edit_id = ? ORDER BY v.seq"
        )
        return [_event(row) for row in self._rows(sql, (storable_text(edit_id),))]

    def events_of_kind(self, kinds: Sequence[str], limit: int = 1000) -> list[EventRecord]:
        """The newest events of some kinds, newest first."""
        marks = ", ".join("?" * len(kinds))
        sql = f"SELECT * FROM events WHERE kind IN ({marks}) ORDER BY seq DESC LIMIT ?"
        return [_event(row) for row in self._rows(sql, (*kinds, limit))]

    def models(self) -> list[ModelRecord]:
        """Every model that the ledger has seen, with how many edits it has."""
        rows = self._rows(
            "SELECT m.id, m.name, m.base_hash, m.architecture,"
            " (SELECT count(*) FROM edits e WHERE e.model_id = m.id) AS edits,"
            " (SELECT count(*) FROM edits e WHERE e.model_id = m.id AND e.status = 'active') AS active,"
            " (SELECT json_extract(p.environment, '$.dtype') FROM patches p WHERE p.model_id = m.id"
            "  ORDER BY p.id LIMIT 1) AS dtype FROM models m ORDER BY m.id"
        )
        return [ModelRecord(**dict(row)) for row in rows]

    def all_events(self) -> list[dict[str, Any]]:
        """Every event as a row, oldest first, with `edit_ids` and `payload` parsed; damaged ones are left out."""
        return read_chain(self._rows("SELECT * FROM events ORDER BY seq"), None)[0]

    def last_event(
        self,
        kind: str,
        having: Mapping[str, str],
        *,
        model_id: int | None = None,
        before: int | None = None,
    ) -> EventRecord | None:
        """The latest event of a kind whose payload has these texts, of one model or before an event."""
        conditions: list[str] = ["kind = ?"]
        values: list[Any] = [kind]
        for name, text in having.items():
            conditions.append("json_extract(payload, ?) = ?")
            values += [f"$.{name}", storable_text(text)]
        for column, wanted in (("model_id = ?", model_id), ("seq < ?", before)):
            if wanted is not None:
                conditions.append(column)
                values.append(wanted)
        sql = f"SELECT * FROM events WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT 1"
        row = self._row(sql, values)
        return None if row is None else _event(row)

    def edits_in_events(self, after: int) -> list[tuple[int, str, str]]:
        """The events with a greater number than `after`: number, kind and edit, once for each edit they name.

        An event that names no edit has an empty text there.
        """
        sql = (
            "SELECT v.seq, v.kind, coalesce(x.edit_id, '') AS edit_id FROM events v"
            " LEFT JOIN event_edits x ON x.seq = v.seq WHERE v.seq > ? ORDER BY v.seq"
        )
        return [(row["seq"], row["kind"], row["edit_id"]) for row in self._rows(sql, (after,))]

    def newest_event(self) -> int:
        """The number of the newest event; 0 when there is none."""
        return self._last_event()

    def measurements_of(self, edit_id: str) -> list[MeasurementRecord]:
        """Every measurement of one edit, oldest first."""
        rows = self._rows(
            "SELECT * FROM measurements WHERE edit_id = ? ORDER BY id", (storable_text(edit_id),)
        )
        return [
            MeasurementRecord(r["edit_id"], r["at"], r["occasion"], parse_json(r["measured"], {}))
            for r in rows
        ]

    def pristine_measurements(
        self, edit_ids: Sequence[str], base_hash: str, pristine_state: str
    ) -> dict[str, list[Json]]:
        """Of each edit the measurements, oldest first, whose answers before are those of the unedited model.

        Audits say so by `before_of`, the hash of its weights. The measurement at an apply counts if nothing was active
        before: the weights were the pristine ones, and the state before was `pristine_state`, if any was recorded.
        """
        found: dict[str, list[Json]] = {}
        for start in range(0, len(edit_ids), _CHUNK):
            chunk = [storable_text(edit_id) for edit_id in edit_ids[start : start + _CHUNK]]
            sql = _PRISTINE.format(", ".join("?" * len(chunk)))
            for row in self._rows(sql, (*chunk, base_hash, base_hash, pristine_state, pristine_state)):
                found.setdefault(row["edit_id"], []).append(parse_json(row["measured"], {}))
        return found

    def _edits(self, where: str, params: Sequence[Any]) -> list[EditRecord]:
        return [edit_record(row) for row in self._rows(f"{EDITS} {where}", tuple(params))]

    def _last_state(self, model_id: int, column: str) -> str | None:
        row = self._row(
            f"SELECT {column} AS h FROM events WHERE model_id = ? AND weights_hash IS NOT NULL"
            " ORDER BY seq DESC LIMIT 1",
            (model_id,),
        )
        return None if row is None else row["h"]

    def _times_active(self, edit_id: str) -> list[tuple[int, float]]:
        """The ranges of event numbers (first, last) during which an edit was in the weights."""
        spans: list[tuple[int, float]] = []
        for event in self.events_of(edit_id):
            if event.kind in ("applied", "reapplied"):
                spans.append((event.seq, float("inf")))
            elif event.kind in ("reverted", "replaced") and spans:
                spans[-1] = (spans[-1][0], event.seq)
        return spans


def edit_record(row: sqlite3.Row) -> EditRecord:
    """A row of EDITS as a record."""
    values = {name: row[name] for name in EditRecord.__dataclass_fields__}
    return EditRecord(**values | {"request": parse_json(row["request"], {})})


def _stack_entry(rows: Sequence[sqlite3.Row]) -> StackEntry:
    patch = rows[0]
    return StackEntry(
        patch_id=patch["id"],
        position=patch["position"],
        method=patch["method"],
        kind=patch["kind"],
        params=parse_json(patch["params"], {}),
        blob=patch["blob"] or "",  # an active patch has one unless the ledger was changed by hand
        source_blob=patch["source_blob"],
        rows=tuple(row["edit_row"] for row in rows if row["status"] == "active"),
        edit_ids=tuple(row["edit_id"] for row in rows),
        weights_hash_before=patch["weights_hash_before"],
        weights_hash_after=patch["weights_hash_after"],
        state_hash=patch["state_hash"],
        environment=parse_json(patch["environment"], {}),
    )


def _event(row: sqlite3.Row) -> EventRecord:
    values = {name: row[name] for name in EventRecord.__dataclass_fields__}
    read = {"edit_ids": tuple(parse_json(row["edit_ids"], [])), "payload": parse_json(row["payload"], {})}
    return EventRecord(**values | read)
