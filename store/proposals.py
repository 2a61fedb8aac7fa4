"""Proposals: edits that were computed and measured, and wait for somebody to decide."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from sqlite_utils import Database

from store.canonical import dump_json, json_value, now, parse_json, storable_text
from store.chain import NewEvent, append_event, storable_or_none
from store.changes import insert, next_number
from store.connection import Connection
from store.errors import BadFilter, NoSuchProposal, WrongState
from store.history import differences
from store.records import NOBODY, Approval, Json, Problem, ProposalRecord, Who

PROPOSED, DECIDED = "proposed", "decided"
PROPOSAL_EVENTS = frozenset({PROPOSED, DECIDED})
Decision = Literal["approved", "declined", "changes"]
STATES = ("waiting", "approved", "declined", "changes")


class Proposals(Connection):
    """The methods of the ledger for proposals. Like edits, their rows follow from the events."""

    def record_proposal(
        self,
        model_id: int,
        request: Mapping[str, Any],
        report: Mapping[str, Any],
        data: bytes | None,
        states: Mapping[str, Any],
        who: Who = NOBODY,
        *,
        reason: str | None = None,
        source: str | None = None,
    ) -> ProposalRecord:
        """Record a proposal.

        `request` is what apply_edits would be called with, `report` what the preview measured, `data` the patch
        that it computed (None where there is none to keep), and `states` the hashes it was computed on.
        """
        with self._new_files() as put:
            blob = None if data is None else put(data, {"proposal": request})
            with self._write() as db:
                proposal_id = f"p{next_number(db, 'proposals', 'seq')}"
                payload = {
                    "id": proposal_id,
                    "request": json_value(request),
                    "report": json_value(report),
                    "states": json_value(states),
                    "source": storable_or_none(source),
                    "blob": blob,
                }
                new = NewEvent(kind=PROPOSED, payload=payload, model_id=model_id, reason=reason)
                insert(db, "proposals", proposal_row(append_event(db, new, who, now())))
        return self.get_proposal(proposal_id)

    def record_decision(
        self, proposal_id: str, decision: Literal["declined", "changes"], who: Who, note: str | None = None
    ) -> ProposalRecord:
        """Record a decision by which nothing is applied. Raises NoSuchProposal, and WrongState if it was decided
        already."""
        with self._write() as db:
            decide(db, proposal_id, decision, who, now(), note)
        return self.get_proposal(proposal_id)

    def get_proposal(self, proposal_id: str) -> ProposalRecord:
        """One proposal. Raises NoSuchProposal."""
        row = self._row("SELECT * FROM proposals WHERE id = ?", (storable_text(proposal_id),))
        if row is None:
            raise NoSuchProposal(_unknown(proposal_id))
        return _record(row)

    def proposals(self, state: str | None = None, limit: int = 50, offset: int = 0) -> list[ProposalRecord]:
        """Proposals, newest first. Raises BadFilter for a state that does not exist."""
        if state is not None and state not in STATES:
            raise BadFilter(f"state {state!r} does not exist; use one of {', '.join(STATES)}")
        where, params = ("WHERE state = ?", [state]) if state is not None else ("", [])
        rows = self._rows(
            f"SELECT * FROM proposals {where} ORDER BY seq DESC LIMIT ? OFFSET ?", [*params, limit, offset]
        )
        return [_record(row) for row in rows]

    def proposals_in_events(self, after: int) -> list[str]:
        """The proposals that events with a greater number than `after` are about."""
        rows = self._rows(
            "SELECT DISTINCT json_extract(payload, '$.id') AS id FROM events WHERE seq > ? AND kind IN (?, ?)",
            (after, PROPOSED, DECIDED),
        )
        return [str(row["id"]) for row in rows]

    def count_proposals(self, state: str) -> int:
        """How many proposals are in a state."""
        row = self._row("SELECT count(*) AS n FROM proposals WHERE state = ?", (state,))
        return int(row["n"]) if row is not None else 0


def decide(
    db: Database,
    proposal_id: str,
    decision: Decision,
    who: Who,
    at: str,
    note: str | None,
    edit_ids: Sequence[str] = (),
) -> None:
    """Record a decision, in the caller's transaction. Raises NoSuchProposal or WrongState."""
    row = db.execute("SELECT * FROM proposals WHERE id = ?", [storable_text(proposal_id)]).fetchone()
    if row is None:
        raise NoSuchProposal(_unknown(proposal_id))
    if row["state"] != "waiting":
        raise WrongState(
            f"{proposal_id} was {_IN_WORDS[row['state']]} already, at {row['decided']}; nothing was changed"
        )
    own = is_proposer(_record(row), who.identity, who.client)
    payload = {"id": proposal_id, "decision": decision, "by_proposer": own}
    new = NewEvent(
        kind=DECIDED, payload=payload, model_id=row["model_id"], edit_ids=tuple(edit_ids), reason=note
    )
    changed = decided(append_event(db, new, who, at))
    sets = ", ".join(f"{name} = ?" for name in changed)
    db.execute(f"UPDATE proposals SET {sets} WHERE id = ?", [*changed.values(), proposal_id])


def approve(db: Database, approval: Approval, who: Who, at: str, edit_ids: Sequence[str]) -> None:
    """Record that a proposal was applied as these edits, in the transaction that records them."""
    decide(db, approval.proposal_id, "approved", who, at, approval.note, edit_ids)


def is_proposer(proposal: ProposalRecord, identity: str | None, client: str | None) -> bool:
    """Whether this is the proposer: the same identity or, if none was checked, a client of the same name."""
    if identity is not None or proposal.identity is not None:
        return identity == proposal.identity
    return client is not None and client == proposal.client


_IN_WORDS = {"approved": "approved", "declined": "declined", "changes": "sent back for changes"}


def proposal_row(event: Mapping[str, Any]) -> Json:
    """The row of `proposals` that a proposed event adds."""
    payload = event["payload"]
    return {
        "seq": int(payload["id"][1:]),
        "id": payload["id"],
        "model_id": event["model_id"],
        "state": "waiting",
        "request": dump_json(payload["request"]),
        "report": dump_json(payload["report"]),
        "states": dump_json(payload["states"]),
        "blob": payload["blob"],
        "reason": event["reason"],
        "source": payload["source"],
        "client": event["client"],
        "identity": payload.get("identity"),
        "event_seq": event["seq"],
        "created": event["at"],
        "decided": None,
        "decided_client": None,
        "decided_identity": None,
        "note": None,
        "edit_ids": "[]",
    }


def decided(event: Mapping[str, Any]) -> Json:
    """The columns of `proposals` that a decided event changes."""
    return {
        "state": event["payload"]["decision"],
        "decided": event["at"],
        "decided_client": event["client"],
        "decided_identity": event["payload"].get("identity"),
        "note": event["reason"],
        "edit_ids": dump_json(list(event["edit_ids"])),
    }


def check_proposals(
    rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[Problem]:
    """Compare the rows of `proposals` with the events; yields every problem."""
    expected: dict[str, Json] = {}
    for event in events:
        try:
            if event["kind"] == PROPOSED:
                expected[event["payload"]["id"]] = proposal_row(event)
            elif event["kind"] == DECIDED:
                expected[event["payload"]["id"]].update(decided(event))
        except (KeyError, TypeError, ValueError) as error:
            yield Problem("chain", f"event {event['seq']}", f"does not describe a proposal ({error!r})")
    for row in rows:
        made = expected.pop(row["id"], None)
        if made is None:
            yield Problem("row", f"proposal {row['id']}", "is not in any event")
        elif different := differences(made, row):
            yield Problem("row", f"proposal {row['id']}", "was altered: " + "; ".join(different))
    for name in expected:
        yield Problem("row", f"proposal {name}", "is missing from proposals, but it is in the events")


def _unknown(proposal_id: str) -> str:
    return f"no proposal has the id {proposal_id[:80]!r}; list_proposals shows all of them"


def _record(row: sqlite3.Row) -> ProposalRecord:
    values = {name: row[name] for name in ProposalRecord.__dataclass_fields__}
    read = {name: parse_json(row[name], {}) for name in ("request", "report", "states")}
    return ProposalRecord(**values | read | {"edit_ids": tuple(parse_json(row["edit_ids"], []))})
