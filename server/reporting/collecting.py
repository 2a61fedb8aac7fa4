"""What a report says, read from the ledger alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from server.errors import ServiceError
from server.proposals.deciders import decided_by
from server.settings import errata_version
from store import Ledger, ProposalRecord
from store.overview import Overview

MOST = 20_000
"""Corrections in one report."""
Row = dict[str, Any]

_IN_PERIOD = "(?1 IS NULL OR {at} >= ?1) AND (?2 IS NULL OR {at} < ?2)"
_FACTS = f"""
SELECT f.*, e.weights_hash_after, p.source_blob, v.seq AS event, v.hash AS event_hash, p.seconds
FROM facts f JOIN edits e ON e.id = f.edit_id JOIN patches p ON p.id = e.patch_id
JOIN events v ON v.seq = p.event_seq
WHERE (?3 IS NULL OR p.id = ?3) AND (({_IN_PERIOD.format(at="f.created")}) OR ({_IN_PERIOD.format(at="f.changed")}))
ORDER BY e.seq LIMIT {MOST + 1}"""
_DAMAGE = f"""
SELECT d.* FROM damage d JOIN edits e ON e.id = d.edit_id
WHERE (?3 IS NULL OR e.patch_id = ?3) AND {_IN_PERIOD.format(at="d.at")} ORDER BY d.at LIMIT {MOST}"""
_DRIFT = f"""
SELECT t.* FROM drift t JOIN events v ON v.seq = t.event_seq
WHERE v.kind <> 'rejected' AND (?3 IS NULL OR EXISTS
  (SELECT 1 FROM patches p WHERE p.id = ?3 AND (p.event_seq = v.seq)))
AND {_IN_PERIOD.format(at="t.at")} ORDER BY t.id"""
_ENDS = f"""
SELECT v.seq, v.at, v.kind, v.hash, v.weights_hash FROM events v
WHERE {_IN_PERIOD.format(at="v.at")} AND (?3 IS NULL OR EXISTS
  (SELECT 1 FROM event_edits x JOIN edits e ON e.id = x.edit_id WHERE x.seq = v.seq AND e.patch_id = ?3))
ORDER BY v.seq"""
_TAKEN_BACK = f"""
SELECT h.at, h.what, h.edit_id, h.prompt, h.right_answer, coalesce(h.identity, h.client) AS by, h.reason, h.seq
FROM history h JOIN edits e ON e.id = h.edit_id
WHERE h.what IN ('reverted', 'replaced') AND (?3 IS NULL OR e.patch_id = ?3) AND {_IN_PERIOD.format(at="h.at")}
AND e.method <> 'steering' ORDER BY h.seq"""

_PROPOSALS = f"""
SELECT id FROM proposals WHERE CASE WHEN ?3 IS NULL
  THEN ({_IN_PERIOD.format(at="created")}) OR (decided IS NOT NULL AND {_IN_PERIOD.format(at="decided")})
  ELSE EXISTS (SELECT 1 FROM json_each(edit_ids) j JOIN edits e ON e.id = j.value WHERE e.patch_id = ?3) END
ORDER BY seq LIMIT {MOST}"""


@dataclass(frozen=True)
class Report:
    """Everything a report says."""

    made: str
    version: str
    since: str | None
    until: str | None
    batch: int | None
    models: list[Row]
    facts: list[Row]
    taken_back: list[Row]
    damage: list[Row]
    drift: list[Row]
    proposals: list[Row]
    first: Row | None  # events at both ends of the period
    last: Row | None
    weights_hash: str | None  # after the last change of the period
    events: int
    problems: list[str]

    def count(self, status: str) -> int:
        """Corrections of a status."""
        return sum(fact["status"] == status for fact in self.facts)

    def holding(self, holds: str | None) -> int:
        """Active corrections that hold so; None: that were never measured."""
        return sum(fact["status"] == "active" and fact["holds"] == holds for fact in self.facts)

    @property
    def approvals(self) -> dict[str, Row]:
        """The proposals that became edits, by the ids of those."""
        return {edit_id: each for each in self.proposals for edit_id in each["edit_ids"]}

    @property
    def perplexity(self) -> float | None:
        """Perplexity at the end of the period as a multiple of the original model's; None if it was not measured."""
        for row in reversed(self.drift):
            if row["perplexity_before"] and row["perplexity_after"]:
                return float(row["perplexity_after"]) / float(row["perplexity_before"])
        return None


def collect(
    ledger: Ledger, overview: Overview, since: str | None, until: str | None, batch: int | None
) -> Report:
    """Read a period or a batch. `until` is a day that is included, or a time. Raises ServiceError."""
    begin, end = _time(since, "since", False), _time(until, "until", True)
    if begin is not None and end is not None and begin >= end:
        raise ServiceError(f"since {since!r} is after until {until!r}; swap them")
    given: Sequence[Any] = [begin, end, batch]
    facts = overview.rows(_FACTS, given)
    if len(facts) > MOST:
        raise ServiceError(f"more than {MOST:,} corrections are in that period; take a shorter one")
    if batch is not None and not facts:
        raise ServiceError(
            f"batch {batch} has no correction in that period; list_edits shows those there are"
        )
    ends = overview.rows(_ENDS, given)
    changes = [row["weights_hash"] for row in ends if row["weights_hash"]]
    return Report(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=errata_version(),
        since=begin,
        until=end,
        batch=batch,
        models=[vars(model) for model in ledger.models()],
        facts=facts,
        taken_back=overview.rows(_TAKEN_BACK, given),
        damage=overview.rows(_DAMAGE, given),
        drift=overview.rows(_DRIFT, given),
        proposals=[_proposal(ledger.get_proposal(row["id"])) for row in overview.rows(_PROPOSALS, given)],
        first=ends[0] if ends else None,
        last=ends[-1] if ends else None,
        weights_hash=changes[-1] if changes else None,
        events=len(ends),
        problems=[str(problem) for problem in ledger.verify(files=True)],
    )


def _proposal(found: ProposalRecord) -> Row:
    edits = found.request.get("edits") or []
    return {
        "id": found.id,
        "state": found.state,
        "facts": [f"{edit.get('prompt')} -> {edit.get('target')}" for edit in edits],
        "by": found.identity or found.client,
        "created": found.created,
        "reason": found.reason,
        "source": found.source,
        "decided": found.decided,
        "decided_by": decided_by(found),
        "note": found.note,
        "edit_ids": list(found.edit_ids),
    }


def _time(text: str | None, name: str, end: bool) -> str | None:
    """A time as the ledger writes it; a day alone ends with its last moment."""
    if text is None or not text.strip():
        return None
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ServiceError(
            f"{name} {text[:80]!r} is not an ISO 8601 date or time; write 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None
    if end and len(text.strip()) == 10:
        at += timedelta(days=1)
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    return at.isoformat(timespec="microseconds")
