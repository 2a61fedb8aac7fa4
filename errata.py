"""The composition root: settings in, a running MCP server out."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared._stream_protocols import ReadStream, WriteStream
from mcp_types import (
    CallToolResult,
    GetPromptResult,
    InputRequiredResult,
    Resource,
    SetLevelRequestParams,
    SubscribeRequestParams,
    SubscriptionsListenRequestParams,
    UnsubscribeRequestParams,
)
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import tools
from server import logs, maintenance
from server.http import sessions
from server.http.auth import Door
from server.http.connections import ImpatientProtocol
from server.http.hosts import Hosts
from server.http.oauth import Verifier
from server.http.presence import Watch
from server.http.stoppable import Web
from server.http.tokens import TokenBook
from server.openai.app import app as openai_app
from server.priority import keep_what_is_loaded, switch_often
from server.settings import Settings, errata_version
from server.startup import Startup
from server.stopping import on_signal
from tools import roles
from tools.app import apps
from tools.changes import Subscriptions
from tools.client_logs import ClientLogs
from tools.completions import add_completions
from tools.icons import server_icons
from tools.instructions import INSTRUCTIONS, READ_ONLY
from tools.prompts import add_prompts, check_prompt
from tools.resources import active_edits, add_resources
from tools.unreadable import AnsweredStream

if TYPE_CHECKING:
    from server.board.app import Board

log = logging.getLogger("errata")

GRACE = 10.0
"""Seconds a running call gets to finish when the server is told to stop."""


class ErrataServer(MCPServer[Any]):
    """The SDK's server, with an answer to a call of a tool that is not served."""

    def __init__(self, settings: Settings, startup: Startup, served: Sequence[Tool]) -> None:
        self.subscriptions = Subscriptions(startup)
        client_logs = ClientLogs(self.subscriptions)
        super().__init__(
            "errata",
            title="Errata",
            description="Keeps the knowledge of a language model correct.",
            instructions=INSTRUCTIONS + (READ_ONLY if settings.read_only else ""),
            version=errata_version(),
            icons=server_icons(),
            tools=list(served),
            lifespan=_lifespan(startup, self.subscriptions, client_logs),
            extensions=[apps()],
            middleware=[
                self.subscriptions.middleware,
                client_logs.middleware,
                roles.hiding(settings.approval),
            ],
        )
        self._serve_ourselves(client_logs)
        self._startup = startup
        self._choices = settings
        self.board = _board(settings, startup)
        self._names = frozenset(tool.name for tool in served)

    def _serve_ourselves(self, client_logs: ClientLogs) -> None:
        """Answer what the SDK's server does not serve by itself, or not for what never changes."""
        serve = self._lowlevel_server.add_request_handler
        serve("resources/subscribe", SubscribeRequestParams, self.subscriptions.subscribe)
        serve("resources/unsubscribe", UnsubscribeRequestParams, self.subscriptions.unsubscribe)
        serve("subscriptions/listen", SubscriptionsListenRequestParams, self.subscriptions.listen)
        serve("logging/setLevel", SetLevelRequestParams, client_logs.set_level)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool by name.

        Raises:
            ToolError: there is no such tool (the text says which there are), or it failed.
        """
        if name not in self._names:
            raise ToolError(tools.missing(name, self._choices))
        if context is not None:
            roles.check(name, context, self._choices.approval)
        return await super().call_tool(name, arguments, context)

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> GetPromptResult | InputRequiredResult:
        """Render a prompt. Raises MCPError (-32602) for an unknown prompt and for wrong arguments."""
        check_prompt(name, arguments, self._prompt_manager.list_prompts())
        roles.check_prompt_scope(name, context, self._choices.approval)
        return await super().get_prompt(name, arguments, context)

    def http(self) -> Starlette:
        """The ASGI application: MCP at /mcp, OpenAI clients at /v1, the board at /. Without a check of who connects."""
        # `Door` has checked Host and Origin.
        unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        served = sessions.app(self._lowlevel_server, unchecked)
        if "inspect" in self._choices.toolsets:
            served.mount("/v1", openai_app(self._startup))
        if self.board is not None:
            served.router.routes.extend(self.board.routes())
        return served

    async def speak(self, messages: ReadStream[Any], answers: WriteStream[Any]) -> None:
        """Serve one client over these two streams, until it leaves."""
        options = self._lowlevel_server.create_initialization_options()
        await self._lowlevel_server.run(messages, answers, options)

    def ready(self) -> tuple[bool, str]:
        """Whether the model can be asked, and the state in a word."""
        return self._startup.state == "ready", self._startup.state

    async def list_resources(self) -> list[Resource]:
        """The fixed resources and the newest active edits."""
        return [*await super().list_resources(), *await active_edits(self._startup)]


def _lifespan(
    startup: Startup, subscriptions: Subscriptions, client_logs: ClientLogs
) -> Callable[[MCPServer[Any]], AbstractAsyncContextManager[None]]:
    """What runs as long as the server serves: the start of the model, and what tells clients of changes."""

    @asynccontextmanager
    async def begin(_: MCPServer[Any]) -> AsyncIterator[None]:
        # Here and not before: the transport has taken stdout by now, so nothing that the model's
        # libraries print can end up between its messages.
        startup.begin()
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(subscriptions.run)
            tasks.start_soon(client_logs.run)
            try:
                yield
            except Exception as error:  # kept out of the task group, which would wrap it in a group
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    return begin


def _board(settings: Settings, startup: Startup) -> Board | None:
    """The pages for people; None where there are none."""
    if settings.transport != "http" or not settings.board:
        return None
    from server.board.app import Board  # not at the top: it brings SQLite along, and clients over stdio wait
    from server.board.source import Running

    return Board(Running(startup), secure=(settings.public_url or "").startswith("https:"))


def build(settings: Settings, startup: Startup | None = None) -> ErrataServer:
    """The server with all its tools, resources and prompts; loads nothing and starts nothing."""
    startup = startup or Startup(settings)
    served = tools.build(settings, startup)
    server = ErrataServer(settings, startup, served)
    add_resources(server, startup)
    add_completions(server, startup)
    add_prompts(server, {tool.name for tool in served})
    return server


def http_app(server: ErrataServer, settings: Settings) -> ASGIApp:
    """The ASGI application that serves MCP at /mcp and OpenAI clients at /v1, behind the checks of who connects.

    Raises:
        ValueError: tokens that cannot be used, or none though other machines can reach the server.
    """
    listed = settings.tokens.get_secret_value() if settings.tokens else None
    token = settings.token.get_secret_value() if settings.token else None
    verifier = None
    if settings.oauth_issuer:
        verifier = Verifier(settings.oauth_issuer, settings.resource, settings.oauth_jwks)
    door = Door(
        Watch(server.http()),
        Hosts(settings.host, settings.allowed_hosts, settings.allowed_origins),
        TokenBook(token, listed, settings.token_file),
        verifier,
        server.ready,
        server.board.visitors if server.board is not None else None,
        settings.wanted_scopes,
    )
    return _for_pages(door, settings.allowed_origins) if settings.allowed_origins else door


def _for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let scripts of pages with these origins call, and read what is answered; they send no cookies."""
    exposed = ["Mcp-Session-Id", "WWW-Authenticate"]
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(app, origins, methods, allow_headers=["*"], expose_headers=exposed)


def main(argv: list[str] | None = None) -> None:
    """Run the server until its client leaves (stdio) or it is told to stop."""
    logs.configure("text")
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in maintenance.COMMANDS:
        sys.exit(maintenance.run(arguments))
    if arguments and arguments[0] == "board":
        from server.board.command import run as run_board

        sys.exit(run_board(arguments[1:]))
    if arguments and arguments[0] == "decide":
        from server.proposals.command import run as run_decide

        sys.exit(run_decide(arguments[1:]))
    settings = Settings.parse(arguments)
    logs.configure(settings.log_format)
    switch_often()
    startup = Startup(settings)
    startup.when_ready(keep_what_is_loaded)
    server = build(settings, startup)
    try:
        if settings.transport == "http":
            anyio.run(_serve_http, _door(server, settings), server, settings)
        else:
            anyio.run(_serve_stdio, server, startup)
    finally:
        _leave(startup)


async def _serve_stdio(server: ErrataServer, startup: Startup) -> None:
    async with anyio.create_task_group() as tasks:

        def stop() -> None:
            # Reading stdin cannot be interrupted, so the process is ended beside it; the
            # cancelled calls let go of the model meanwhile.
            threading.Thread(target=_leave, args=(startup, True), daemon=True).start()
            tasks.cancel_scope.cancel()

        tasks.start_soon(on_signal, stop)
        async with stdio_server() as (messages, answers):
            await server.speak(AnsweredStream(messages, answers), answers)
        tasks.cancel_scope.cancel()


def _door(server: ErrataServer, settings: Settings) -> ASGIApp:
    """`http_app`; ends the process as a wrong command line does when there are tokens that cannot be used."""
    try:
        return http_app(server, settings)
    except ValueError as error:
        log.error("%s", error)
        raise SystemExit(2) from None


async def _serve_http(app: ASGIApp, server: ErrataServer, settings: Settings) -> None:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # uvicorn's own writes to stdout
        access_log=False,
        timeout_graceful_shutdown=5,
        http=ImpatientProtocol,
        ws="none",
    )
    web = Web(config)
    async with anyio.create_task_group() as tasks:

        def stop() -> None:
            server.subscriptions.close()  # their streams would keep uvicorn waiting
            if server.board is not None:
                server.board.close()
            web.stop()

        tasks.start_soon(on_signal, stop)
        await web.serve()
        tasks.cancel_scope.cancel()


def _leave(startup: Startup, at_once: bool = False) -> None:
    """Close the services; end the process the hard way where something would keep it alive."""
    done = startup.close(GRACE)
    if at_once or not done:
        logging.shutdown()
        os._exit(0)
