"""The real server as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = str(ROOT / "server.py")


def arguments(home: Path, **options: Any) -> list[str]:
    """The command line of a server: `model=...` becomes `--model ...`."""
    given = {"home": home, "threads": 1} | options
    return [
        SERVER,
        *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))),
    ]


@asynccontextmanager
async def connected(home: Path, mode: str = "auto", **options: Any) -> AsyncIterator[Client]:
    """A client of a new server process over stdio; leaving closes its stdin and waits for its end."""
    parameters = StdioServerParameters(
        command=sys.executable, args=arguments(home, **options), env=dict(os.environ), cwd=str(ROOT)
    )
    with anyio.fail_after(300):
        async with Client(parameters, mode=mode) as client:
            yield client


def start(home: Path, stderr: int | IO[bytes] = subprocess.PIPE, **options: Any) -> subprocess.Popen[bytes]:
    """A server process to speak to byte by byte."""
    return subprocess.Popen(
        [sys.executable, *arguments(home, **options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
    )
