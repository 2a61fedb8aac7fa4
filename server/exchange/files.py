"""The files of HOME/exports and HOME/imports: written whole or not at all, read from there alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServiceError
from server.exhausted import in_words

SUMS = "SHA256SUMS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_DEVICES = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # names Windows keeps for itself
_WRITING = ".writing-"


@dataclass(frozen=True)
class ExportedFiles:
    """A new entry of HOME/exports."""

    path: Path
    names: list[str]
    bytes: int
    sha256: str


def check_name(name: str) -> None:
    """Raise ServiceError for a name that is not a plain file name on every system."""
    if not _NAME.fullmatch(name) or name.endswith(".") or _DEVICES.fullmatch(name):
        raise ServiceError(
            f"name {name[:80]!r} cannot be used for an export; take 1 to 80 letters, digits, dots, dashes and "
            'underscores, beginning with a letter or digit, such as "capitals-2026"'
        )


def folder(home: Path, name: str) -> Path:
    """HOME/exports or HOME/imports, made where missing. Raises ServiceError when it leads elsewhere."""
    path = home / name
    if path.is_symlink():
        raise ServiceError(f"{path} is a link to another place; make it a folder of its own")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServiceError(f"{path} cannot be made: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def new_entry(home: Path, name: str) -> Iterator[Path]:
    """A scratch folder beside the final place; whatever fails in the block leaves nothing behind.

    Raises ServiceError when the name is taken or the disk refuses.
    """
    check_name(name)
    exports = folder(home, "exports")
    refuse_existing(exports / name)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_WRITING, dir=exports))
    except OSError as error:
        raise ServiceError(f"{exports} cannot be written: {error.strerror or error}") from error
    try:
        yield scratch
    except OSError as error:
        raise ServiceError(f"{exports} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise ServiceError when something has this name already."""
    if os.path.lexists(path):
        raise ServiceError(
            f"exports already has {path.name!r}, and nothing there is ever overwritten; choose another name"
        )


def publish_folder(scratch: Path, target: Path) -> ExportedFiles:
    """Sum and sync the files of a scratch folder and give it its name."""
    files = sorted(p.relative_to(scratch).as_posix() for p in scratch.rglob("*") if p.is_file())
    sums = "".join(f"{sha256_of(scratch / f)}  {f}\n" for f in files)
    (scratch / SUMS).write_text(sums, "utf-8")
    files = [*files, SUMS]
    total = sum(_sync(scratch / f) for f in files)
    refuse_existing(target)
    inner = scratch / "out"  # mkdtemp made the scratch folder for its owner alone
    inner.mkdir()
    for f in sorted({Path(f).parts[0] for f in files}):
        (scratch / f).rename(inner / f)
    inner.rename(target)
    return ExportedFiles(target, files, total, hashlib.sha256(sums.encode()).hexdigest())


def publish_file(file: Path, target: Path, names: list[str]) -> ExportedFiles:
    """Sync a file and give it its name."""
    total = _sync(file)
    digest = sha256_of(file)
    refuse_existing(target)
    file.rename(target)
    return ExportedFiles(target, names, total, digest)


def remove_entry(target: Path) -> None:
    """Remove an entry of HOME/exports that was just written."""
    if target.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    else:
        target.unlink(missing_ok=True)


def _sync(path: Path) -> int:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_room(home: Path, bytes_needed: int) -> None:
    """Raise ServiceError when the disk has no room for so many bytes."""
    free = shutil.disk_usage(home).free
    if free < 1.02 * bytes_needed:
        raise ServiceError(
            f"the export takes {in_words(bytes_needed)}, and the disk of {home} has {in_words(free)} free; free some "
            "space, or export a smaller format (lora, patches)"
        )
