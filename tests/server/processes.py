"""The real server as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from tests import device, fork_server

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = str(ROOT / "server.py")


def arguments(home: Path, **options: Any) -> list[str]:
    """The command line of a server: `model=...` becomes `--model ...`."""
    given = {"home": home, "threads": 1, "device": device.chosen, "dtype": "float32"} | options
    return [
        SERVER,
        *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))),
    ]


@asynccontextmanager
async def connected(
    home: Path,
    mode: str = "auto",
    person: Any = None,
    switches: Sequence[str] = (),
    fresh: bool = False,
    **options: Any,
) -> AsyncIterator[Client]:
    """A client of a new server process over stdio; leaving closes its stdin and waits for its end.

    `person` answers what the server asks; `switches`: options without a value; `fresh`: an interpreter that has
    imported nothing (it takes seconds), as users start it.
    """
    program, *rest = fork_server.command(*arguments(home, **options), *switches, fresh=fresh)
    parameters = StdioServerParameters(
        command=program,
        args=rest,
        env=dict(os.environ),
        cwd=str(ROOT),
    )
    with anyio.fail_after(300):
        async with Client(parameters, mode=mode, elicitation_callback=person) as client:
            yield client


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def listening(*command: str, url: str) -> Iterator[str]:
    """A server in a process of its own, once it answers at `url`."""
    started = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        for _ in range(600):
            try:
                if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                    break
            except OSError:
                assert started.poll() is None, started.stderr.read().decode()  # type: ignore[union-attr]
                time.sleep(0.1)
        yield url
    finally:
        started.terminate()
        started.communicate(timeout=30)


class Agent:
    """An agent's client that stays connected while the person works."""

    def __init__(self, portal: Any, client: Client) -> None:
        self._portal, self._client = portal, client

    def __call__(self, tool: str, **given: Any) -> dict[str, Any]:
        result = self._portal.call(self._client.call_tool, tool, given)
        assert not result.is_error, result.content
        answer: dict[str, Any] = result.structured_content
        return answer


@contextmanager
def agent_of(url: str) -> Iterator[Agent]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(Client(f"{url}/mcp")) as client:
        yield Agent(portal, client)


class Gone(Exception):
    """The server ended before it answered."""


class Wire:
    """A server process spoken to line by line, to see and do what a well-behaved client would not."""

    def __init__(self, home: Path, fresh: bool = False, **options: Any) -> None:
        """`fresh`: start it in an interpreter that has imported nothing, as users do; it takes seconds."""
        self.process = fork_server.start(*arguments(home, **options), fresh=fresh)
        self._log: list[bytes] = []
        self._drain = threading.Thread(target=self._keep_log, daemon=True)
        self._drain.start()
        self._number = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream
            with suppress(OSError):
                stream.close()

    def _keep_log(self) -> None:
        assert self.process.stderr
        with suppress(ValueError):  # closed at the end of the test
            self._log.extend(self.process.stderr)

    def send(self, *lines: bytes) -> None:
        """Write raw lines. Raises Gone when nobody reads them any more."""
        assert self.process.stdin
        try:
            self.process.stdin.write(b"".join(lines))
            self.process.stdin.flush()
        except OSError as end:
            raise Gone from end

    def greet(self) -> None:
        """The handshake."""
        client = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "t", "version": "1"},
        }
        assert self.ask("initialize", client)["result"]["serverInfo"]["name"] == "errata"
        self.send(line({"jsonrpc": "2.0", "method": "notifications/initialized"}))

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        """Send a request and wait for its answer; whatever comes before it must be protocol too."""
        self._number += 1
        self.send(line({"jsonrpc": "2.0", "id": self._number, "method": method, "params": params}))
        assert self.process.stdout
        for said in self.process.stdout:
            if not said.endswith(b"\n"):
                break  # cut off in the middle of a line
            message = json.loads(said)
            assert message["jsonrpc"] == "2.0"
            if message.get("id") == self._number:
                return message
        self._drain.join(60)
        raise Gone(b"".join(self._log[-30:]).decode())

    def told(self, tool: str, **given: Any) -> dict[str, Any]:
        """What a tool answers; fails when it is an error."""
        result = self.ask("tools/call", {"name": tool, "arguments": given})["result"]
        assert not result.get("isError"), result["content"]
        answer: dict[str, Any] = result["structuredContent"]
        return answer

    def end(self) -> tuple[int, bytes, str]:
        """Wait for the process to end: exit code, the rest of its stdout, its log."""
        assert self.process.stdout
        rest = self.process.stdout.read()
        code = self.process.wait(60)
        self._drain.join(60)
        return code, rest, b"".join(self._log).decode()

    def leave(self) -> tuple[int, bytes, str]:
        """Close stdin, as a client that leaves does, and wait for the end."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.end()


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
