"""Backups of HOME: a consistent copy while a server writes, checked as it is made and as it is restored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from store.blobs import SUFFIX
from store.canonical import now
from store.errors import LedgerError
from store.head import HEAD, Head, write_head
from store.history import History
from store.home_lock import HomeLock
from store.ledger import Ledger
from store.opening import (
    DATABASE,
    Opened,
    forgiving_text,
    open_database,
    open_for_reading,
    require_ledger,
)

MANIFEST = "backup.json"
FORMAT = "errata-backup-1"
ALWAYS, STATISTICS = ("trained",), "statistics"
PARTS = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", HEAD, "blobs", *ALWAYS, STATISTICS)
"""The files that a restored backup replaces. Models, exports, imports and data stay as they are."""


@dataclass(frozen=True)
class BackupReport:
    """What a backup holds."""

    path: Path
    events: int
    edits: int
    files: int
    bytes: int


def backup(home: Path, target: Path, *, statistics: bool = True) -> BackupReport:
    """Copy the ledger, the patch files, trained editors and statistics to a new folder; a server may be writing.

    What is copied is one state of the ledger with every file that it names. Raises LedgerError if the folder is
    not new, or if the ledger or a file is damaged; then nothing is left behind.
    """
    require_ledger(home)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LedgerError(f"{target} exists already; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.writing")
    scratch.mkdir()
    try:
        _copy(home, scratch, statistics)
        report = _describe(scratch, target)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
        return report
    except OSError as error:
        raise LedgerError(f"the backup cannot be written to {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy(home: Path, scratch: Path, statistics: bool) -> None:
    opened = open_for_reading(home)
    try:
        if opened.lost:
            raise LedgerError(f"there is nothing whole to back up: {opened.lost}")
        _copy_database(opened, scratch / DATABASE)
    finally:
        opened.close()
    with _ledger_of(scratch) as ledger:
        events = ledger.all_events()
    (scratch / "blobs").mkdir()
    history = History(events)
    for sha in sorted(history.blobs - history.removed):
        for name in (f"{sha}{SUFFIX}", f"{sha}.json"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(home / "blobs" / name, scratch / "blobs" / name)
    for name in (*ALWAYS, *([STATISTICS] if statistics else [])):
        if (home / name).is_dir():
            shutil.copytree(home / name, scratch / name, ignore=shutil.ignore_patterns("*.tmp"))
    with _ledger_of(scratch) as ledger:
        if problems := ledger.verify():
            raise LedgerError(
                f"the home {home} is damaged, and a backup of it would be too: {problems[0]}"
                f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}"
            )


def _copy_database(opened: Opened, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
        opened.db.conn.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        last = copy.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    write_head(target.parent, Head(*(last or (0, ""))))


def _ledger_of(folder: Path) -> Ledger:
    """The ledger in a backup, which nobody writes."""
    db = open_database(folder / DATABASE, write=False, immutable=True)
    db.conn.text_factory = forgiving_text
    uri = f"{(folder / DATABASE).resolve().as_uri()}?immutable=1"
    return Ledger(folder, Opened(db, uri))


def _describe(scratch: Path, target: Path) -> BackupReport:
    """Write the manifest, with the SHA-256 of every file, and everything to the disk."""
    files = {
        path.relative_to(scratch).as_posix(): path for path in sorted(scratch.rglob("*")) if path.is_file()
    }
    with _ledger_of(scratch) as ledger:
        events, edits = len(ledger.all_events()), ledger.list_edits(limit=1).total
    manifest = {
        "format": FORMAT,
        "at": now(),
        "events": events,
        "files": {name: _sync(path) for name, path in files.items()},
    }
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
    _sync(scratch / MANIFEST)
    total = sum(path.stat().st_size for path in files.values())
    return BackupReport(target, events, edits, len(files), total)


def _sync(path: Path) -> str:
    """Sync a file to the disk; returns its SHA-256."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def restore(source: Path, home: Path, *, replace: bool = False) -> tuple[BackupReport, Path | None]:
    """Make `home` what it was when the backup was made.

    Present files are moved to a folder HOME/replaced-..., whose path is returned too; without `replace` they are an
    error. Raises LedgerError for a backup that is not whole, and LedgerInUse while a server runs.
    """
    files = _checked(source)
    home.mkdir(parents=True, exist_ok=True)
    lock = HomeLock(home)
    try:
        present = [name for name in PARTS if (home / name).exists()]
        if any((home / name).exists() for name in (DATABASE, HEAD)) or _holds_files(home / "blobs"):
            if not replace:
                raise LedgerError(
                    f"{home} has a ledger already; with --replace it is moved aside, or restore to another --home"
                )
        else:
            present = [name for name in present if name in ("blobs",)]
        scratch = home / f".restoring-{os.getpid()}"
        with _removed_at_the_end(scratch):
            for name in files:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, scratch / name)
                _sync(scratch / name)
            aside = move_aside(home, [name for name in present if name != HEAD])
            if aside is not None and HEAD in present:
                shutil.copyfile(
                    home / HEAD, aside / HEAD
                )  # it stays, since until the end it names what is missing
            for name in sorted({Path(n).parts[0] for n in files}, key=_order):
                _put(scratch / name, home / name)
    except OSError as error:
        raise LedgerError(f"{home} cannot be written: {error}") from error
    finally:
        lock.release()
    with Ledger.open(home) as ledger:
        if problems := ledger.verify():
            raise LedgerError(f"the restored home {home} is damaged: {problems[0]}")
        total = sum((home / name).stat().st_size for name in files)
        edits, events = ledger.list_edits(limit=1).total, len(ledger.all_events())
    return BackupReport(home, events, edits, len(files), total), aside


def _order(name: str) -> int:
    """head.json first and the database last: a restore that is cut off is a ledger that is missing, not a new one."""
    return {HEAD: 0, DATABASE: 2}.get(name, 1)


def _put(source: Path, target: Path) -> None:
    """Move a file or folder into its place; files of a folder that is there already stay beside the new ones."""
    if not target.is_dir():
        source.replace(target)
        return
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(f"*{SUFFIX}"))


@contextlib.contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_aside(home: Path, names: list[str]) -> Path | None:
    """Move files and folders of HOME to a new folder HOME/replaced-...; None when there are none."""
    if not names:
        return None
    aside = home / f"replaced-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    aside.mkdir()
    for name in names:
        (home / name).rename(aside / name)
    return aside


def _checked(source: Path) -> list[str]:
    """The names of the files of a backup, each with the hash in the manifest. Raises LedgerError."""
    try:
        manifest: dict[str, Any] = json.loads((source / MANIFEST).read_bytes())
        files: dict[str, str] = dict(manifest["files"])
        if manifest["format"] != FORMAT or DATABASE not in files:
            raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{source} is not a backup: {error}") from error
    for name, sha in files.items():
        path = source / name
        if (
            path.is_absolute() is not source.is_absolute()
            or ".." in Path(name).parts
            or Path(name).is_absolute()
        ):
            raise LedgerError(f"the backup {source} names {name!r}, which is not inside it")
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LedgerError(
                f"the backup {source} is not whole: {name}: {error.strerror or error}"
            ) from error
        if found != sha:
            raise LedgerError(
                f"the backup {source} is damaged: {name} does not have the hash it was made with"
            )
    with _ledger_of(source) as ledger:
        if problems := ledger.verify():
            raise LedgerError(f"the backup {source} is damaged: {problems[0]}")
    return list(files)
