"""What all pages share: who looks, what they may do, the overview of the ledger, and how a page is written."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from server.board.rendering import HEADERS, environment
from server.board.source import Source
from server.http.identity import Identity, Scope, identity_of
from server.http.visitors import COOKIE, Visitors
from server.request_context import RequestContext
from server.settings import errata_version
from store import Ledger, LedgerError, ProposalRecord
from store.overview import Overview

MOST_BYTES = 100_000
"""Bytes of a form."""
_readers = 8
_Value = TypeVar("_Value")

Handler = Callable[[Request], Awaitable[Response]]


class Stop(Exception):
    """Raised when a page cannot be shown or a form is not accepted; its message is shown instead."""

    def __init__(self, status: int, heading: str, text: str) -> None:
        super().__init__(text)
        self.status, self.heading, self.text = status, heading, text


class Desk:
    """The board's common part."""

    def __init__(self, source: Source, visitors: Visitors, secure: bool) -> None:
        self.source, self.visitors, self._secure = source, visitors, secure
        self._env = environment()
        self._overview: tuple[Ledger, Overview] | None = None
        self._limit: anyio.CapacityLimiter | None = None

    # --- what there is ---------------------------------------------------------------------------

    @property
    def overview(self) -> Overview | None:
        """The overview of the ledger, once that is open."""
        ledger = self.source.ledger()
        if ledger is None:
            return None
        if self._overview is None or self._overview[0] is not ledger:
            self._overview = (ledger, Overview(ledger))
        return self._overview[1]

    def opened(self) -> tuple[Ledger, Overview]:
        """The ledger and its overview. Raises Stop until they are open."""
        ledger, overview = self.source.ledger(), self.overview
        if ledger is None or overview is None:
            raise Stop(503, "Not yet", f"The ledger opens with the model. {self.source.message}")
        return ledger, overview

    @property
    def model_id(self) -> int | None:
        """The model that is loaded; None for all models of the ledger."""
        services = self.source.services()
        return None if services is None else services.workspace.model_id

    async def thread(self, work: Callable[[], _Value]) -> _Value:
        """Run something that reads or writes in a thread, beside the event loop."""
        if self._limit is None:
            self._limit = anyio.CapacityLimiter(_readers)
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limit)

    # --- who looks -------------------------------------------------------------------------------

    def may(self, request: Request, scope: Scope) -> bool:
        """Whether the visitor's scopes include this one, and the model is here to be changed."""
        services = self.source.services()
        if scope != "read" and (services is None or services.workspace.read_only):
            return False
        identity = identity_of(request.scope)
        if scope == "edit" and self.source.settings.approval:
            scope = "admin"
        return identity is None or identity.may(scope)

    def is_own(self, request: Request, proposal: ProposalRecord) -> bool:
        """Whether the visitor made this proposal, and so cannot approve it."""
        identity = identity_of(request.scope)
        own = identity is not None and identity.name == proposal.identity
        return own and not self.source.settings.approve_own

    def context(self, request: Request) -> RequestContext:
        """The request context of the visitor, as the ledger records it."""
        identity: Identity | None = identity_of(request.scope)
        return RequestContext(
            client="board", client_version=errata_version(), identity=identity.name if identity else None
        )

    async def form(self, request: Request) -> dict[str, str]:
        """The fields of a form that this browser was shown. Raises Stop for any other."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise Stop(413, "Too long", f"A form may have {MOST_BYTES:,} bytes.")
        fields = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100))
        if not self.visitors.is_own_form(request.scope, fields.pop("proof", "")):
            raise Stop(
                403,
                "Please try again",
                "This form is from another page or from before a restart. Nothing was changed.",
            )
        return fields

    # --- what is written -------------------------------------------------------------------------

    def page(
        self,
        request: Request,
        template: str,
        here: str,
        values: Mapping[str, Any] | None = None,
        status: int = 200,
    ) -> Response:
        """A page as HTML."""
        sid = self.visitors.sid(request.scope)
        new = sid is None
        sid = sid or secrets.token_urlsafe(32)
        refreshing = "x-board" in request.headers
        identity = identity_of(request.scope)
        shared: dict[str, Any] = {
            "here": here,
            "closed": False,
            "proof": self.visitors.proof(sid),
            "notes": [] if refreshing else self.visitors.told(sid),
            "identity": identity.name if identity else None,
            "may_edit": self.may(request, "edit"),
            "may_propose": self.may(request, "propose"),
            "may_admin": self.may(request, "admin"),
            "may_ask": self.source.services() is not None,
            "source_state": self.source.state,
            **self._state(),
        }
        html = self._env.get_template(template).render(shared | dict(values or {}))
        response = HTMLResponse(html, status, HEADERS)
        if new:
            self.keep(response, sid)
        return response

    def _state(self) -> dict[str, Any]:
        services, ledger = self.source.services(), self.source.ledger()
        try:
            waiting = ledger.count_proposals("waiting") if ledger is not None else 0
            event = ledger.newest_event() if ledger is not None else 0
        except LedgerError:
            waiting = event = 0
        return {
            "state": self.source.state,
            "message": self.source.message,
            "home": str(self.source.settings.home),
            "model": services.workspace.lm.name if services is not None else self.source.settings.model,
            "read_only": bool(services is not None and services.workspace.read_only),
            "waiting": waiting,
            "event": event,
            "open": ledger is not None,
        }

    def keep(self, response: Response, sid: str) -> None:
        """Give the browser its id."""
        response.set_cookie(COOKIE, sid, path="/", httponly=True, samesite="lax", secure=self._secure)

    def tell(self, request: Request, kind: str, text: str) -> None:
        """A message on the next page of this browser."""
        if sid := self.visitors.sid(request.scope):
            self.visitors.tell(sid, kind, text)

    def stopped(self, request: Request, stop: Stop) -> Response:
        """The page of a Stop."""
        closed = identity_of(request.scope) is None and stop.status == 401
        values = {"heading": stop.heading, "text": stop.text, "closed": closed}
        return self.page(request, "message.html", "", values, stop.status)

    @staticmethod
    def to(path: str) -> Response:
        """Go on with another page of the board."""
        inside = path.startswith("/") and not path.startswith(("//", "/\\"))
        return RedirectResponse(path if inside else "/", 303, HEADERS)
