"""Processes that begin with everything imported: forked from one process that has imported it once.

A new interpreter needs seconds of computing until torch, transformers and the server are imported; a forked one is
there at once. It is a process of its own like any other: it has its own files, and it can be killed.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLIENT = Path(__file__).with_name("fork_client.py")
AVAILABLE = sys.platform == "linux"
"""Elsewhere libraries that torch uses do not survive a fork; there processes start the usual way."""
PRELOADED = ("errata", "server.services", "server.rebase", "tests.families", "tests.server.opened", "pytest")


class ForkServer:
    """The process that forks, in this process' environment. Ends with this process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="errata-fork-")
        self.path = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == b"ready\n"
        atexit.register(self.close)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def command(self, *arguments: str) -> list[str]:
        """A command that runs `python *arguments` in a forked process, for programs that start commands."""
        return [sys.executable, "-I", "-S", str(CLIENT), self.path, *arguments]


class ForkedProcess:
    """What `subprocess.Popen` is for a process that was started the usual way, as far as the tests need it."""

    def __init__(self, path: str, arguments: Sequence[str]) -> None:
        theirs, ours = zip(os.pipe(), os.pipe()[::-1], os.pipe()[::-1], strict=True)
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(n, m) for n, m in zip(ours, ("wb", "rb", "rb"), strict=True)
        )
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(path)
        ask(self._server, arguments, theirs)
        for end in theirs:
            os.close(end)
        (self.pid,) = struct.unpack("i", self._server.recv(4))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            (self.returncode,) = struct.unpack("i", self._server.recv(4))
            self._server.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end: the exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._server], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ask(server: socket.socket, arguments: Sequence[str], streams: Sequence[int]) -> None:
    """Ask the server at the other end of a socket to run `python *arguments` with these streams, here."""
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": str(ROOT)}
    data = json.dumps(wanted).encode()
    socket.send_fds(server, [struct.pack("q", len(data))], streams)
    server.sendall(data)


@cache
def fork_server() -> ForkServer:
    """The one of this process, started when it is first needed."""
    return ForkServer()


def command(*arguments: str, fresh: bool = False) -> list[str]:
    """The command of `python *arguments`: `SCRIPT ...` or `-c CODE ...`. `fresh`: in an interpreter of its own."""
    if fresh or not AVAILABLE:
        return [sys.executable, *arguments]
    return fork_server().command(*arguments)


def start(*arguments: str, fresh: bool = False) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start `python *arguments`, with pipes for its streams. `fresh`: in an interpreter of its own."""
    if fresh or not AVAILABLE:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT)
    return ForkedProcess(fork_server().path, arguments)


def _serve(path: str) -> None:
    """Import everything, then fork for every client until stdin is closed."""
    for name in PRELOADED:
        __import__(name)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    clients: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([0, listener, woken, *clients.values()], [], [])
            for pid, client in clients.items():
                if client in ready or 0 in ready:  # a client says nothing more: it is gone
                    os.kill(pid, signal.SIGKILL)
            if 0 in ready:
                return
            if woken in ready:
                woken.recv(64)
                _report_ends(clients)
            if listener in ready:
                client, _ = listener.accept()
                _fork(client, [listener, wake, woken, *clients.values()], clients)


def _report_ends(clients: dict[int, socket.socket]) -> None:
    """Tell the clients of processes that have ended how they ended."""
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with clients.pop(pid) as client:
            client.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))


def _fork(client: socket.socket, inherited: list[socket.socket], clients: dict[int, socket.socket]) -> None:
    """Receive what a client wants run, and run it in a child."""
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    wanted = bytearray()
    while len(wanted) < struct.unpack("q", length)[0]:
        wanted += client.recv(1 << 16)
    pid = os.fork()
    if not pid:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (client, *inherited):
            each.close()
        os._exit(_run(json.loads(wanted), streams))
    for stream in streams:
        os.close(stream)
    client.sendall(struct.pack("i", pid))
    clients[pid] = client


def _run(wanted: dict[str, Any], streams: list[int]) -> int:
    """Be the interpreter that was asked for; returns its exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, mode), line_buffering=number == 2)
        for number, mode in enumerate(("rb", "wb", "wb"))
    )
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    first, *rest = wanted["arguments"]
    code = 0
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [first, *rest]
            exec(compile(Path(first).read_text(), first, "exec"), {"__name__": "__main__", "__file__": first})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve(sys.argv[1])
