"""Access over HTTP: allowed hosts and origins, and the bearer token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import is_loopback

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to serve other machines without a token.

    Raises:
        ValueError: the host is not loopback and there is no token.
    """
    if not is_loopback(host) and not token:
        raise ValueError(
            f"--host {host} can be reached by other machines, and no token is configured; "
            "set ERRATA_TOKEN to a long random text, or use --host 127.0.0.1"
        )


def security(host: str) -> TransportSecuritySettings:
    """The Host and Origin headers that are accepted: the defence against DNS rebinding.

    If the server listens on every address ("0.0.0.0", "::"), its names cannot be known. The token,
    which a foreign web page cannot send, and the comparison of Origin with Host protect it instead.
    """
    if host in ("0.0.0.0", "::"):
        return TransportSecuritySettings(enable_dns_rebinding_protection=False)
    names = [*LOOPBACK] if is_loopback(host) else [*LOOPBACK, _bracketed(host)]
    if (own := _bracketed(host)) not in names:
        names.append(own)
    return TransportSecuritySettings(
        allowed_hosts=[pattern for name in names for pattern in (name, f"{name}:*")],
        allowed_origins=[
            f"{scheme}://{pattern}"
            for scheme in ("http", "https")
            for name in names
            for pattern in (name, f"{name}:*")
        ],
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class Gate:
    """ASGI middleware: refuses requests without the token, and requests from foreign web pages.

    If no token is configured, only the origin is checked.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._digest = _digest(token) if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        refusal = self._unauthorised(headers.getlist("authorization")) or _foreign(headers)
        await (refusal or self._app)(scope, receive, send)

    def _unauthorised(self, given: Sequence[str]) -> Response | None:
        if self._digest is None:
            return None
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(token.strip()), self._digest):
            return None
        error = ', error="invalid_token"' if given else ""
        return JSONResponse(
            {"error": "send the server's token as 'Authorization: Bearer TOKEN'"},
            status_code=401,
            headers={"WWW-Authenticate": f'Bearer realm="errata"{error}'},
        )


def _digest(token: str) -> bytes:
    # Equal lengths, so that the comparison takes the same time for every token.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _foreign(headers: Headers) -> Response | None:
    origin = headers.get("origin")
    if origin is None:
        return None
    parts = urlsplit(origin)
    if parts.netloc == headers.get("host") or is_loopback(parts.hostname or ""):
        return None
    return JSONResponse({"error": "requests from this origin are not accepted"}, status_code=403)
