"""The door of the HTTP transport: probes, allowed hosts and origins, and whose token a request has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import anyio.to_thread
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http import oauth
from server.http.hosts import Hosts
from server.http.identity import Identity, remember
from server.http.oauth import Refused, Verifier
from server.http.tokens import TokenBook
from server.http.visitors import Visitors, is_of_the_board, is_open

Ready = Callable[[], tuple[bool, str]]
"""A function: whether the model can be asked, and the state in one word."""


class Door:
    """ASGI middleware: accepts a request if its host, its origin and its token are accepted.

    Without `tokens` and `verifier` no token is asked for. `/health` and `/ready` answer with one word and need no
    token. `wanted`: the scopes that a client should ask an authorization server for, which may grant fewer.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        tokens: TokenBook,
        verifier: Verifier | None = None,
        ready: Ready = lambda: (True, "ready"),
        visitors: Visitors | None = None,
        wanted: str = "read edit",
    ) -> None:
        self._app, self._hosts, self._tokens, self._verifier = app, hosts, tokens, verifier
        self._ready, self._visitors, self._wanted = ready, visitors, wanted
        if visitors is not None and self._asks:
            visitors.admits = self.identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._open(scope) or self._foreign(scope) or await self._unauthorised(scope)
            await (answer or self._app)(scope, receive, send)

    def _open(self, scope: Scope) -> Response | None:
        """What everybody may read."""
        path = scope["path"].rstrip("/")
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if path == "/ready":
            ready, state = self._ready()
            return JSONResponse({"status": state}, status_code=200 if ready else 503)
        if self._verifier and path in oauth.metadata_paths(self._verifier.audience):
            about = oauth.metadata(self._verifier.audience, self._verifier.issuer)
            return JSONResponse(about, headers={"Access-Control-Allow-Origin": "*"})
        return None

    def _foreign(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host")
        if not self._hosts.accepts(host, scope):
            text = "this server does not answer to that Host; its operator can allow it with --allowed-hosts"
            return JSONResponse({"error": text}, status_code=421)
        if not self._hosts.accepts_origin(headers.get("origin"), host):
            return JSONResponse({"error": "requests from this origin are not accepted"}, status_code=403)
        return None

    async def _unauthorised(self, scope: Scope) -> Response | None:
        """Note the holder of the request's token; returns a refusal if no token is accepted."""
        if not self._asks:
            return None
        given = Headers(scope=scope).getlist("authorization")
        if self._visitors is not None and not given and is_of_the_board(scope["path"]):
            return await self._visiting(scope, self._visitors)
        try:
            identity = await self._identity(given)
        except Refused as refused:
            return self._refusal(401, str(refused), "invalid_token" if given else None)
        if not identity.may("read"):
            return self._refusal(403, f"{identity.name} may do nothing here", "insufficient_scope")
        _note(scope, identity)
        return None

    async def _visiting(self, scope: Scope, visitors: Visitors) -> Response | None:
        """A browser that looks at the board: it has logged in with a token, or is asked to."""
        token = visitors.token(scope)
        if token is not None:
            try:
                identity = await self.identify(token)
            except Refused:  # withdrawn, or over
                visitors.log_out(visitors.sid(scope))
            else:
                if identity.may("read"):
                    _note(scope, identity)
                    return None
        if is_open(scope["path"]):
            return None
        if scope["method"] != "GET" or scope["path"] == "/board/events":
            return JSONResponse({"error": "log in first"}, status_code=401)
        here = scope["path"] + (
            f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        )
        return RedirectResponse(f"/board/login?{urlencode({'next': here})}", 303)

    @property
    def _asks(self) -> bool:
        """True when a token is asked for."""
        return bool(self._tokens) or self._verifier is not None

    async def _identity(self, given: Sequence[str]) -> Identity:
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Refused("send a token as 'Authorization: Bearer TOKEN'")
        return await self.identify(token)

    async def identify(self, token: str) -> Identity:
        """Who holds a token. Raises Refused."""
        if (identity := self._tokens.find(token)) is not None:
            return identity
        if self._verifier is None:
            raise Refused("this token is not known here; send one as 'Authorization: Bearer TOKEN'")
        return await anyio.to_thread.run_sync(self._verifier.verify, token)

    def _refusal(self, status: int, text: str, error: str | None) -> Response:
        says: dict[str, Any] = {"realm": "errata"}
        if error:
            says |= {"error": error}
        if self._verifier:
            says |= {"scope": self._wanted, "resource_metadata": oauth.metadata_url(self._verifier.audience)}
        challenge = "Bearer " + ", ".join(f'{name}="{value}"' for name, value in says.items())
        return JSONResponse({"error": text}, status_code=status, headers={"WWW-Authenticate": challenge})


def _note(scope: Scope, identity: Identity) -> None:
    remember(scope, identity)
    # So that the SDK keeps a session for the one who began it.
    holder = AccessToken(token="", client_id=identity.name, scopes=sorted(identity.scopes))
    scope["user"] = AuthenticatedUser(holder)
