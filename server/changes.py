"""What changed since the last look: edits, jobs, and the state of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.jobs.service import JobService
from store import Ledger

_SHOWN_JOBS = 50


@dataclass(frozen=True)
class Seen:
    """How far somebody has looked."""

    event: int
    jobs: Mapping[str, tuple[str, float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """What is new since a `Seen`."""

    status: bool = False
    edits: tuple[str, ...] = ()
    edits_listed: bool = False  # an edit became active or stopped being so
    jobs: tuple[str, ...] = ()
    proposals: tuple[str, ...] = ()


def look(ledger: Ledger, jobs: JobService, seen: Seen | None) -> tuple[Seen, Changes]:
    """What changed since `seen`, and the new `seen`. To somebody who has seen nothing, all edits are new. Reads the
    ledger alone."""
    listed = {j.job_id: (j.state, j.progress, j.message) for j in jobs.list(None, _SHOWN_JOBS).jobs}
    if seen is None:
        return Seen(ledger.newest_event(), listed), Changes(status=True, edits_listed=True)
    events = ledger.edits_in_events(seen.event)
    changes = Changes(
        status=bool(events),
        edits=tuple(dict.fromkeys(edit for _, _, edit in events if edit)),
        edits_listed=any(edit and kind not in ("measured", "rejected") for _, kind, edit in events),
        jobs=tuple(job for job, values in listed.items() if seen.jobs.get(job) != values),
        proposals=tuple(ledger.proposals_in_events(seen.event)) if events else (),
    )
    return Seen(max((seq for seq, _, _ in events), default=seen.event), listed), changes
