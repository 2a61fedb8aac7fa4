"""Tokens that the operator hands out, each with a name and a scope.

They come from ERRATA_TOKEN (one token, may do everything), from ERRATA_TOKENS ("name=scope:token, ..."), and from a
TOML file (`--token-file`). The file is read again when it changes, so a token is withdrawn without a restart:

    [tokens.dashboard]
    scope = "read"
    sha256 = "..."     # of the token; or `token = "..."` in plain text
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.http.identity import SCOPES, Identity
from server.setting_values import check_token

log = logging.getLogger("errata.http")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

Book = dict[str, tuple[bytes, Identity]]  # by name: SHA-256 of the token, and who holds it


def checked_token(token: str, where: str) -> str:
    """A token that can be used. Raises ValueError, which does not repeat it."""
    try:
        check_token(token)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    return token


def from_text(text: str) -> Book:
    """The tokens of "name=scope:token, name=scope:token". Raises ValueError."""
    book: Book = {}
    for number, part in enumerate(filter(None, (p.strip() for p in text.split(","))), 1):
        name, equals, rest = part.partition("=")
        scope, colon, token = rest.partition(":")
        if not (equals and colon):
            raise ValueError(f"entry {number} is not of the form name=scope:token")
        _add(book, name.strip(), scope.strip(), _digest(checked_token(token.strip(), f"the token of {name}")))
    return book


def from_file(path: Path) -> Book:
    """The tokens of a TOML file. Raises ValueError, which names the file."""
    try:
        tables = tomllib.loads(path.read_text("utf-8")).get("tokens", {})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    book: Book = {}
    try:
        for name, entry in tables.items():
            _add(book, name, str(_entry(entry, name).get("scope", "")), _digest_of(entry, name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not book:
        raise ValueError(f"{path} has no [tokens.NAME] table")
    return book


def _entry(entry: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"tokens.{name} must be a table with scope and token or sha256")
    return entry


def _digest_of(entry: Mapping[str, Any], name: str) -> bytes:
    if isinstance(entry.get("token"), str):
        return _digest(checked_token(entry["token"], f"tokens.{name}.token"))
    digest = entry.get("sha256")
    if isinstance(digest, str) and re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        return bytes.fromhex(digest)
    raise ValueError(f"tokens.{name} needs `token`, or `sha256` with 64 hexadecimal digits")


def _add(book: Book, name: str, scope: str, digest: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a token; use letters, digits and . _ @ - (64 characters at most)"
        )
    if scope not in SCOPES:
        raise ValueError(f"the token of {name} has the scope {scope!r}; choose from {', '.join(SCOPES)}")
    if name in book:
        raise ValueError(f"there are two tokens of the name {name}")
    book[name] = (digest, Identity(name, frozenset({scope})))


class TokenBook:
    """Finds who holds a token."""

    def __init__(self, token: str | None = None, listed: str | None = None, file: Path | None = None) -> None:
        """Raises ValueError for tokens or a file that cannot be used."""
        self._fixed: Book = from_text(listed) if listed else {}
        if token:
            self._fixed.setdefault("token", (_digest(token), Identity("token", frozenset({"admin"}))))
        self._file, self._lock = file, threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._read: Book = {}
        if file is not None:
            self._stamp, self._read = _stamp(file), from_file(file)

    def __bool__(self) -> bool:
        return bool(self._fixed or self._file)

    def find(self, token: str) -> Identity | None:
        """Who holds this token; takes the same time for every wrong one."""
        digest, found = _digest(token), None
        for known, identity in [*self._fixed.values(), *self._from_file().values()]:
            if hmac.compare_digest(digest, known):
                found = identity
        return found

    def _from_file(self) -> Book:
        if self._file is None:
            return {}
        with self._lock:
            if (stamp := _stamp(self._file)) != self._stamp:
                self._stamp = stamp
                try:
                    self._read = from_file(self._file)
                    log.info("%s was read again: %d tokens", self._file, len(self._read))
                except ValueError as error:
                    # Whoever damages the file must not lock everybody in or out for ever: nobody gets in by it.
                    self._read = {}
                    log.error("no token of the file is accepted: %s", error)
            return self._read


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _digest(token: str) -> bytes:
    # Equal lengths, so that the comparison takes the same time for every token.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
