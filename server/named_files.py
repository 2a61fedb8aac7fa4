"""Files that a call names: found in a few folders alone, regular, and of bounded size.

A client may be an agent that was told what to do by a text it read. So a path in a call reaches nothing but
HOME/data, HOME/imports, HOME/exports and the folders that the person who started the server named
(`--folders`). Links are followed, and what they lead to must be in one of those folders too. A file elsewhere
and a file that does not exist are answered with the same words.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from server.errors import ServiceError
from server.settings import Settings

DATA, IMPORTS, EXPORTS = "data", "imports", "exports"
MAX_FILES = 10_000  # in a folder that a call names


def named_file(
    settings: Settings,
    field: str,
    given: str,
    most: int,
    *,
    first: str = DATA,
    suffixes: tuple[str, ...] = (),
) -> Path:
    """The real path of the regular file that a call names; at most `most` bytes.

    A relative name is looked for in HOME/`first`, then in the other folders. `field` is the argument's name, for
    the message. Raises ServiceError.
    """
    path = _find(settings, field, given, first)
    _check_file(path, field, given, most)
    if suffixes and path.suffix not in suffixes:
        raise ServiceError(f"{field} {given[:200]!r} must name a {' or '.join(suffixes)} file")
    return path


def named_folder(settings: Settings, field: str, given: str, most: int, *, first: str = DATA) -> Path:
    """The real path of the folder that a call names: regular files alone, at most `most` bytes in all.

    Raises ServiceError.
    """
    path = _find(settings, field, given, first)
    if not path.is_dir():
        raise ServiceError(f"{field} {given[:200]!r} is not a folder; give the folder that the files are in")
    _check_folder(settings, path, field, given, most)
    return path


def named_path(settings: Settings, field: str, given: str, most: int, *, first: str = DATA) -> Path:
    """As `named_folder` for a folder, as `named_file` for anything else. Raises ServiceError."""
    path = _find(settings, field, given, first)
    if path.is_dir():
        _check_folder(settings, path, field, given, most)
    else:
        _check_file(path, field, given, most)
    return path


def _find(settings: Settings, field: str, given: str, first: str) -> Path:
    if "\x00" in given or not given.strip():
        raise ServiceError(
            f"{field} {given!r} is not a file name; give the name of a file in {settings.home / first}"
        )
    wanted = Path(given).expanduser() if given.startswith("~/") else Path(given)
    roots = _roots(settings, first)
    if ".." not in wanted.parts:
        for place in _places(settings, wanted, roots):
            if os.path.lexists(place):
                return _followed(place, roots, field)
    *others, last = [str(root) for root in roots]
    raise ServiceError(
        f"{field} {given[:200]!r} is not there: files are read from {', '.join(others)} and {last} alone. Put it into "
        f"{roots[0]} and give its name, or start the server with --folders and the folder it is in"
    )


def _roots(settings: Settings, first: str) -> list[Path]:
    names = sorted((DATA, IMPORTS, EXPORTS), key=lambda name: name != first)
    return [*(settings.home / name for name in names), *settings.folders]


def _places(settings: Settings, wanted: Path, roots: Iterable[Path]) -> Iterator[Path]:
    """Where the file may be: by a name in one of the folders, by "imports/name", or by an absolute path."""
    if not wanted.is_absolute():
        yield from (root / wanted for root in roots)
        wanted = settings.home / wanted
    for root in roots:
        for spelled in (root, root.resolve()):  # HOME itself may be reached through a link
            if wanted.is_relative_to(spelled):
                yield wanted


def _followed(place: Path, roots: Iterable[Path], field: str) -> Path:
    """The real path. Raises ServiceError unless it is in one of the folders."""
    try:
        real = place.resolve()
    except (OSError, RuntimeError):  # a loop of links
        real = Path("/")
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise ServiceError(
            f"{field}: {place} is a link to a place that is not read from, or passes through one; copy the file there"
        )
    if not real.exists():
        raise ServiceError(f"{field}: {place} is a link to a file that does not exist")
    return real


def _check_file(path: Path, field: str, given: str, most: int) -> int:
    """Raise ServiceError for anything but a regular file of at most `most` bytes; returns its size."""
    try:
        found = path.stat()
    except OSError as error:
        raise ServiceError(f"{field} {given[:200]!r} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ServiceError(f"{field} {given[:200]!r} is not a regular file; give a file")
    if found.st_size > most:
        raise ServiceError(
            f"{field} {given[:200]!r} has {found.st_size:,} bytes; the most is {most:,}, so give a part of it"
        )
    return found.st_size


def _check_folder(settings: Settings, folder: Path, field: str, given: str, most: int) -> None:
    total = count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > MAX_FILES:
                raise ServiceError(
                    f"{field} {given[:200]!r} has more than {MAX_FILES:,} files; name a folder inside it"
                )
            path = _followed(Path(parent, name), _roots(settings, DATA), field)
            total += _check_file(path, field, str(Path(parent, name)), most)
    if total > most:
        raise ServiceError(
            f"{field} {given[:200]!r} holds {total:,} bytes; the most is {most:,}, so name a folder inside it"
        )
