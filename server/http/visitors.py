"""Who looks at the board: log-in with the same tokens as clients, a cookie, and a token against forged requests."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.http.identity import Identity

COOKIE = "errata_board"
HOURS = 12
"""How long a log-in lasts without a visit."""
MOST = 1_000
"""How many log-ins, and visitors with a message waiting, are kept; then the oldest are dropped."""
OPEN = ("/board/login", "/board/static/")
"""What is shown without a token."""
_SID = re.compile(r"[A-Za-z0-9_-]{43}")

Admits = Callable[[str], Awaitable[Identity]]
"""Who holds a token. Raises server.http.oauth.Refused."""


def is_of_the_board(path: str) -> bool:
    """True for the paths of the board; cookies count for these alone."""
    return path in ("/", "/board") or path.startswith("/board/")


def is_open(path: str) -> bool:
    """True for what is shown without a token."""
    return path.startswith(OPEN)


class Visitors:
    """Browsers that look at the board. In memory: a restart logs everybody out."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._tokens: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._notes: OrderedDict[str, list[tuple[str, str]]] = OrderedDict()
        self.admits: Admits | None = None

    def sid(self, scope: Mapping[str, Any]) -> str | None:
        """The browser's id, as its cookie has it."""
        try:
            cookie = SimpleCookie(Headers(scope=dict(scope)).get("cookie") or "")
        except CookieError:
            return None
        found = cookie[COOKIE].value if COOKIE in cookie else ""
        return found if _SID.fullmatch(found) else None

    def token(self, scope: Mapping[str, Any]) -> str | None:
        """The token that this browser logged in with."""
        sid = self.sid(scope)
        with self._lock:
            token, until = self._tokens.get(sid or "", ("", 0.0))
            if sid is None or until < time.monotonic():
                self._tokens.pop(sid or "", None)
                return None
            self._tokens[sid] = (token, time.monotonic() + 3600 * HOURS)
            return token

    def log_in(self, token: str) -> str:
        """A new id for a browser with this token, which must have been admitted."""
        sid = secrets.token_urlsafe(32)
        with self._lock:
            self._tokens[sid] = (token, time.monotonic() + 3600 * HOURS)
            while len(self._tokens) > MOST:
                self._tokens.popitem(last=False)
        return sid

    def log_out(self, sid: str | None) -> None:
        """Forget a browser."""
        with self._lock:
            self._tokens.pop(sid or "", None)
            self._notes.pop(sid or "", None)

    def proof(self, sid: str) -> str:
        """The token against forged requests that each form of this browser must send."""
        return hmac.new(self._secret, sid.encode(), hashlib.sha256).hexdigest()

    def is_own_form(self, scope: Mapping[str, Any], given: str) -> bool:
        """True when a form comes from a page of the board that this very browser was shown."""
        sid, headers = self.sid(scope), Headers(scope=dict(scope))
        if sid is None or not hmac.compare_digest(self.proof(sid).encode(), given.encode()):
            return False
        origin = headers.get("origin")
        if origin is not None and origin != "null" and urlsplit(origin).netloc != headers.get("host"):
            return False
        return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")

    def tell(self, sid: str, kind: str, text: str) -> None:
        """Keep a message for the next page that this browser gets."""
        with self._lock:
            self._notes.setdefault(sid, []).append((kind, text))
            while len(self._notes) > MOST:
                self._notes.popitem(last=False)

    def told(self, sid: str) -> list[tuple[str, str]]:
        """The messages for this browser, once."""
        with self._lock:
            return self._notes.pop(sid, [])
