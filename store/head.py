"""HOME/head.json: the last event that was recorded, kept outside the database.

A database file that was lost, cut off or replaced by an older copy can be a perfect, shorter ledger. Only something
outside it can show this. The file is written after the COMMIT, so it is never ahead of what was recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from store.blobs import open_regular

HEAD = "head.json"


class Head(NamedTuple):
    """The number and the hash of the last event; 0 and "" when there is none."""

    seq: int
    hash: str


NO_EVENT = Head(0, "")


def read_head(home: Path) -> Head | None:
    """The content of the file; None if there is none, or it cannot be read."""
    try:
        with open_regular(home / HEAD) as file:
            values = json.load(file)
        return Head(int(values["seq"]), str(values["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_head(home: Path, head: Head) -> None:
    """Write the file in one step. If the disk refuses, the former one stays, which is old but not wrong."""
    temporary = home / f".{HEAD}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(head._asdict(), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(home / HEAD)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def missing_events(home: Path, row: Callable[[str, tuple[Any, ...]], Any]) -> str | None:
    """A sentence on the events of HOME/head.json that the database has lost; None if none is lost.

    `row` runs SQL and returns one row or None.
    """
    head = read_head(home)
    if head is None or head.seq == 0:
        return None
    found = row("SELECT hash FROM events WHERE seq = ?", (head.seq,))
    if found is not None and found[0] == head.hash:
        return None
    last = row("SELECT coalesce(max(seq), 0) FROM events", ())[0]
    if found is None:
        span = f"event {head.seq} is" if last == head.seq - 1 else f"events {last + 1} to {head.seq} are"
        what = f"{span} missing, though {HEAD} says they were recorded: ledger.db-wal was lost, or ledger.db cut off"
    else:
        what = (
            f"event {head.seq} is not the one that {HEAD} says was recorded: ledger.db is of another history"
        )
    return f"{what}, or replaced by another copy"
