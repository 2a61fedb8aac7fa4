"""What is left of a HOME whose ledger has lost events, and how to continue with it when a person decides so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.backup import move_aside
from store.blobs import SUFFIX, Blobs
from store.head import HEAD, read_head
from store.history import History
from store.home_lock import HomeLock
from store.ledger import Ledger
from store.opening import DATABASE
from store.records import Problem

FOLDER = "recovered"  # in HOME: patch files that no event names


@dataclass(frozen=True)
class Unnamed:
    """A patch file that no event names, and what was written beside it."""

    sha: str
    path: Path
    about: dict[str, Any] | None


@dataclass(frozen=True)
class Survey:
    """The state of a HOME: every problem, and the patch files that its ledger does not know."""

    problems: list[Problem]
    lost: str
    unnamed: list[Unnamed]


def survey(home: Path) -> Survey:
    """Look at HOME and change nothing. Raises LedgerError where the database cannot be opened at all."""
    with Ledger.open(home, read_only=True) as ledger:
        problems = ledger.verify()
        unnamed = ledger.blobs.names() - History(ledger.all_events()).blobs
        unnamed -= ledger.blobs.known_unnamed() | ledger.blobs.announced()
        files = [
            Unnamed(sha, ledger.blobs.path(sha), ledger.blobs.description(sha)) for sha in sorted(unnamed)
        ]
        return Survey(problems, ledger.lost, sorted(files, key=lambda f: str((f.about or {}).get("at", ""))))


def accept(home: Path) -> tuple[Survey, Path | None]:
    """Continue with what is left: the loss is recorded as an event, and HOME can be written again.

    Files that no event names are moved to HOME/recovered, a database without events aside (its folder is returned).
    Nothing is deleted. Raises LedgerInUse while a server runs.
    """
    lock = HomeLock(home)
    try:
        found = survey(home)
        aside = None
        if found.lost:
            names = [HEAD] if _has_events(home) else [DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", HEAD]
            aside = move_aside(home, [name for name in names if (home / name).exists()])
        head = read_head(aside) if aside is not None else None
        _move_unnamed(home, found)
    finally:
        lock.release()
    with Ledger.open(home) as ledger:
        payload = {
            "lost": found.lost,
            "last_event_recorded": None if head is None else head._asdict(),
            "unnamed": [file.sha for file in found.unnamed],
        }
        ledger.record_event("recovered", payload, reason="accepted by errata-mcp recover --accept")
    return found, aside


def _has_events(home: Path) -> bool:
    with Ledger.open(home, read_only=True) as ledger:
        return bool(ledger.all_events())


def _move_unnamed(home: Path, found: Survey) -> None:
    blobs = Blobs(home / "blobs")
    for file in found.unnamed:
        (home / FOLDER).mkdir(exist_ok=True)
        for path in (file.path, file.path.with_suffix(".json")):
            if path.exists():
                shutil.move(path, home / FOLDER / path.name)
        assert not blobs.path(file.sha).exists()


def recovered_file(home: Path, sha: str) -> Path:
    """Where `accept` moves a file that no event names."""
    return home / FOLDER / f"{sha}{SUFFIX}"
