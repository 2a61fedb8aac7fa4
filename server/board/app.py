"""The board as an ASGI application: `/` and everything under `/board/`."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from server.board.actions import Actions, told
from server.board.desk import Desk, Handler, Stop
from server.board.live import Live
from server.board.pages import Pages
from server.board.rendering import FOLDER, HEADERS
from server.board.source import Source
from server.http.oauth import Refused
from server.http.visitors import Visitors

STATIC = {"board.css": "text/css", "board.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Board:
    """The pages of one source."""

    def __init__(self, source: Source, visitors: Visitors | None = None, secure: bool = False) -> None:
        self.visitors = visitors or Visitors()
        self.live = Live(source)
        self._desk = Desk(source, self.visitors, secure)
        self._pages = Pages(self._desk)
        self._actions = Actions(self._desk, self._pages)

    def close(self) -> None:
        """End the streams, so that the server can stop. Call it in the event loop."""
        self.live.close()

    def routes(self) -> list[Route]:
        """What is served."""
        pages, actions = self._pages, self._actions
        shown: dict[str, Handler] = {
            "/": pages.facts,
            "/board": pages.facts,
            "/board/facts/{edit_id}": pages.fact,
            "/board/sets": pages.sets,
            "/board/sets/{name}": pages.one_set,
            "/board/model": pages.model,
            "/board/proposals": pages.proposals,
            "/board/proposals/{proposal_id}": pages.proposal,
            "/board/steering": pages.steering,
            "/board/maps": pages.maps,
            "/board/maps/{seq:int}": pages.one_map,
            "/board/jobs": pages.jobs,
            "/board/ask": pages.ask,
            "/board/report": pages.report,
            "/board/report/file": pages.report_file,
            "/board/events": self._events,
            "/board/static/{name}": self._static,
            "/board/login": self._login_page,
        }
        done: dict[str, Handler] = {
            "/board/facts/{edit_id}/undo": actions.undo,
            "/board/facts/{edit_id}/redo": actions.redo,
            "/board/facts/{edit_id}/measure": actions.measure,
            "/board/sets/{name}/check": actions.check_set,
            "/board/sets/{name}/{number:int}/propose": actions.propose,
            "/board/proposals/{proposal_id}/decide": actions.decide,
            "/board/steering/dose": actions.dose,
            "/board/steering/measure": actions.calibrate,
            "/board/jobs/{job_id}/cancel": actions.cancel,
            "/board/ask": actions.ask,
            "/board/login": self._log_in,
            "/board/logout": self._log_out,
        }
        return [
            *(Route(path, self._guarded(handler), methods=["POST"]) for path, handler in done.items()),
            *(Route(path, self._guarded(handler)) for path, handler in shown.items()),
        ]

    def app(self) -> Starlette:
        """The board alone, as `errata-mcp board` serves it."""
        served = Starlette(routes=self.routes())
        served.add_middleware(GZipMiddleware, minimum_size=2_000)
        return served

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except Stop as stop:
                return self._desk.stopped(request, stop)
            except Exception as error:
                return self._desk.stopped(request, Stop(500, "This page could not be made", told(error)))

        return guarded

    async def _events(self, _: Request) -> Response:
        if self.live.full:
            raise Stop(503, "Too many pages", "Too many pages listen already.")
        headers = HEADERS | {"X-Accel-Buffering": "no"}
        return StreamingResponse(self.live.stream(), media_type="text/event-stream", headers=headers)

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise Stop(404, "No such file", "The board has no such file.")
        # Not cached for long: after an update the page must not run yesterday's script.
        headers = HEADERS | {"Cache-Control": "max-age=60"}
        return FileResponse(FOLDER / "static" / name, media_type=STATIC[name], headers=headers)

    async def _login_page(self, request: Request) -> Response:
        return self._login(request, request.query_params.get("next", "/"), "")

    def _login(self, request: Request, then: str, refused: str) -> Response:
        values: dict[str, Any] = {"closed": True, "next": then[:500], "refused": refused}
        return self._desk.page(request, "login.html", "", values, 401 if refused else 200)

    async def _log_in(self, request: Request) -> Response:
        fields = await self._desk.form(request)
        then, token = fields.get("next", "/"), fields.get("token", "").strip()
        if self.visitors.admits is None:
            return self._desk.to(then)
        try:
            identity = await self.visitors.admits(token)
        except Refused as refused:
            return self._login(request, then, f"That token is not accepted: {refused}.")
        if not identity.may("read"):
            return self._login(request, then, f"{identity.name} may do nothing here.")
        response = self._desk.to(then)
        self._desk.keep(response, self.visitors.log_in(token))
        return response

    async def _log_out(self, request: Request) -> Response:
        await self._desk.form(request)
        self.visitors.log_out(self.visitors.sid(request.scope))
        return self._desk.to("/board/login")
