"""Ids of edits in a call: one by one ("e4") or as ranges ("e4-e46")."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.errors import ServiceError

LISTED = 50
"""Up to this many ids are named one by one."""
MOST = 100_000
"""Ids that one call may mean."""

_RANGE = re.compile(r"e(\d{1,15})\s*-\s*e?(\d{1,15})")
_ID = re.compile(r"e(\d{1,15})")


def expanded(ids: Sequence[str]) -> list[str]:
    """All ids, with ranges expanded.

    Raises ServiceError for a range that is empty or too large.
    """
    found: list[str] = []
    for each in ids:
        match = _RANGE.fullmatch(each.strip())
        if match is None:
            found.append(each)
            continue
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise ServiceError(
                f"edit_ids {each!r} is an empty range; write the smaller id first, e{last}-e{first}"
            )
        if last - first >= MOST - len(found):
            raise ServiceError(f"edit_ids {each!r} means more than {MOST:,} edits; name fewer in one call")
        found += [f"e{number}" for number in range(first, last + 1)]
    return found


def named(ids: Sequence[str]) -> list[str]:
    """Ids as reports give them: one by one, or, if they are many, runs as ranges."""
    return list(ids) if len(ids) <= LISTED else ranges(ids)


def ranges(ids: Sequence[str]) -> list[str]:
    """Runs of following numbers as ranges, the rest as they are; in the same order."""
    runs: list[list[str]] = []
    for each in ids:
        if runs and _number(each) == _number(runs[-1][-1]) + 1 > 0:
            runs[-1].append(each)
        else:
            runs.append([each])
    return [part for run in runs for part in (run if len(run) < 3 else [f"{run[0]}-{run[-1]}"])]


def _number(edit_id: str) -> int:
    match = _ID.fullmatch(edit_id)
    return int(match[1]) if match else -2
