"""The ASGI application of /v1: OpenAI's API for the corrected model (`errata`) and the pristine one (`errata:base`).

It has the same checks of hosts, origins and tokens as /mcp; the scope `read` is enough.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.http.identity import identity_of
from server.openai.bodies import MODELS, Body, ChatBody, CompletionBody, parse
from server.openai.errors import ApiError, as_api_error
from server.request_context import RequestContext
from server.startup import Startup

if TYPE_CHECKING:
    from server.answering.request import Answers
    from server.answering.service import AnswerService
    from server.openai.asking import Asked

LARGEST = 4 * 2**20
"""Bytes of a body."""
GONE = 499
"""The status that web servers log for a client that is gone; nobody reads it."""

Handler = Callable[[Request], Awaitable[Response]]


def app(startup: Startup) -> Starlette:
    """The routes below /v1."""
    endpoint = _Endpoint(startup)
    routes = [
        Route("/models", _answering(endpoint.models), methods=["GET"]),
        Route("/models/{name:path}", _answering(endpoint.model), methods=["GET"]),
        Route("/chat/completions", _answering(endpoint.chat), methods=["POST"]),
        Route("/completions", _answering(endpoint.complete), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})


async def _no_route(request: Request, _: Exception) -> Response:
    text = (
        f"{request.method} {request.url.path} is not served here; there are GET /v1/models, POST "
        "/v1/chat/completions and POST /v1/completions"
    )
    error = ApiError(404, text)
    return JSONResponse(error.body, error.status)


def _answering(handler: Handler) -> Handler:
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as failure:
            error = as_api_error(failure)
            return JSONResponse(error.body, error.status, headers=error.headers)

    return handle


class _Endpoint:
    def __init__(self, startup: Startup) -> None:
        self._startup = startup

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name) for name in MODELS]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in MODELS:
            text = f"the model {name[:80]!r} does not exist here; there are {' and '.join(MODELS)}"
            raise ApiError(404, text, "model", "model_not_found")
        return JSONResponse(_model(name))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse(ChatBody, await _json(request)))

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, parse(CompletionBody, await _json(request)))

    async def _answer(self, request: Request, body: Body) -> Response:
        ctx = _context(request)
        services = await self._startup.services(ctx)
        # Not at the top: they import torch, and the first answer of the server must not wait for it.
        from server.openai.answering import Shape
        from server.openai.asking import asked
        from server.openai.streaming import Stream

        lm, answers = services.workspace.lm, services.answers
        wanted = await asyncio.to_thread(asked, services.workspace, body)
        if body.stream:
            stream = Stream(lm, answers, wanted, ctx)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream.events(), media_type="text/event-stream", headers=headers)
        said = await _while_there(request, answers, wanted, ctx)
        if said is None:
            return Response(status_code=GONE)
        return JSONResponse(Shape(lm, wanted).whole(said))


async def _while_there(
    request: Request, answers: AnswerService, wanted: Asked, ctx: RequestContext
) -> Answers | None:
    """The answers; None when the client left, which withdraws the request."""
    said: Answers | None = None
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            ctx.cancelled.set()
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            said = await answers.answer(wanted.request(ctx))
        except Exception as error:  # kept out of the task group, which would wrap it in a group
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return said


def _context(request: Request) -> RequestContext:
    identity = identity_of(request.scope)
    return RequestContext(
        client=request.headers.get("user-agent", "")[:200] or None,
        identity=identity.name if identity else None,
    )


async def _json(request: Request) -> Any:
    """The body. Raises ApiError for one that is too large or not JSON."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > LARGEST:
            raise ApiError(413, f"the body has more than {LARGEST:,} bytes; ask in smaller parts")
    try:
        return json.loads(read)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "errata"}
