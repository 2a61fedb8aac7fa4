"""`errata-mcp board`: the board over the home of a server that runs elsewhere, read-only."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Sequence

import uvicorn
from starlette.types import ASGIApp

from server.board.app import Board
from server.board.source import HomeOnly
from server.http.auth import Door
from server.http.hosts import Hosts
from server.http.tokens import TokenBook
from server.settings import Settings
from store import Ledger, LedgerError
from store.opening import require_ledger

PORT = 8766


def run(argv: Sequence[str]) -> int:
    """Serve the board on this machine until Ctrl-C; returns the exit status."""
    options = _parser().parse_args(argv)
    settings = Settings(home=options.home) if options.home else Settings()
    try:
        require_ledger(settings.home)
        ledger = Ledger.open(settings.home, read_only=True)
    except LedgerError as error:
        print(f"errata-mcp board: {error}", file=sys.stderr)
        return 1
    source = HomeOnly(settings, ledger)
    address = f"http://127.0.0.1:{options.port}/"
    print(f"The board of {settings.home} is at {address} (read-only; Ctrl-C ends it)", flush=True)
    if options.open:
        webbrowser.open(address)
    try:
        uvicorn.run(
            served(source),
            host="127.0.0.1",
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
    finally:
        source.close()
    return 0


def served(source: HomeOnly) -> ASGIApp:
    """The board, for this machine alone."""
    return Door(Board(source).app(), Hosts("127.0.0.1"), TokenBook())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata-mcp board",
        description="Show the facts, the history and the health of a home in a browser. Nothing can be changed there; "
        "a server that runs with --transport http serves the board itself, with everything.",
        allow_abbrev=False,
    )
    parser.add_argument("--home", help="the home (default: as for the server)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen on (default {PORT})")
    parser.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open a browser on it"
    )
    return parser
