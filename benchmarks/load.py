"""The whole server under load over HTTP: how long reads take, what goes on when all have left, and its memory.

    python -m benchmarks.load [--model default] [--models DIR] [--clients 100] [--seconds 180] [--statistics DIR]

Of ten clients six ask and check facts, two read, one edits and reverts, one leaves in the middle of a call again and
again; as many connections as clients stay half open. The clients that read are a process of their own, and say how
late their own clock is (`lag`), so that what the others need of the machine is not taken for the server's time.
Times are in seconds, as (median, 99 in 100, most); the load average and the processors' seconds of each process stand
beside them, since a busy machine answers later. `--statistics` names a folder of second moments to begin with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2 as httpx
import psutil
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from benchmarks.processes import cpu_spent, megabytes, watch_memory

COUNTRIES = tuple(
    "France Japan Italy Spain Peru Kenya Chile Cuba Iran Iraq Oman Laos Nepal Mali Togo Fiji".split()  # noqa: SIM905
)
ROOT = Path(__file__).resolve().parent.parent
READERS = (6, 7)
"""Of ten clients these read; the others are WORKERS."""
WORKERS = (0, 1, 2, 3, 4, 5, 8, 9)
TICK = 0.02
SLOW = 0.2
"""Seconds that a read may take."""
READY = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--statistics", type=Path, help="folder with the model's second moments")
    parser.add_argument("--part", choices=("readers", "workers"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(asyncio.run(_part(options))))
        return
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(load(options, Path(home)), indent=1))


# --- clients --------------------------------------------------------------------------------------


class Load:
    """What the clients of one process measured."""

    def __init__(self, url: str, clients: int, seconds: float) -> None:
        self.url, self.seconds, self.end = url, seconds, float("inf")
        self._missing, self._all_there = clients, anyio.Event()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.slow: Counter[int] = Counter()

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    async def everybody(self) -> None:
        """Wait until all clients of both processes are connected, so that only what they do then is measured."""
        self._missing -= 1
        if not self._missing:
            print(READY, flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            self.end = time.monotonic() + self.seconds
            self._all_there.set()
        await self._all_there.wait()

    async def call(self, client: Client, kind: str, tool: str, **given: Any) -> Any:
        started = time.monotonic()
        result = await client.call_tool(tool, given)
        self.times[kind].append(time.monotonic() - started)
        if "_" in kind and self.times[kind][-1] > SLOW:
            self.slow[int(10 * (1 - (self.end - started) / self.seconds))] += 1
        text = getattr(result.content[0], "text", "") if result.is_error else ""
        self.counts[f"{tool}: {'busy' if 'is busy' in text else 'error' if text else 'ok'}"] += 1
        if text and "is busy" not in text:
            self.counts[text[:200]] += 1
        return result.structured_content

    async def asks(self, client: Client, rng: random.Random) -> None:
        """Asks and checks facts."""
        country = rng.choice(COUNTRIES)
        if rng.random() < 0.7:
            prompt = f"The capital of {country} is"
            await self.call(client, "ask", "ask_model", prompt=prompt, max_new_tokens=rng.choice((8, 16, 48)))
        else:
            facts = [{"prompt": f"The capital of {country} is", "expected": "Paris"}] * 3
            await self.call(client, "check", "check_facts", facts=facts)

    async def reads(self, client: Client, rng: random.Random) -> None:
        """Reads, one thing after another, with a short pause as a person or an agent has."""
        tool, given = rng.choice(
            (
                ("list_edits", {}),
                ("model_status", {}),
                ("query_ledger", {"sql": "SELECT count(*) FROM events"}),
                ("list_jobs", {}),
            )
        )
        await self.call(client, tool, tool, **given)
        await anyio.sleep(rng.random() / 2)

    async def edits(self, client: Client, rng: random.Random) -> None:
        """Corrects a fact and takes it back."""
        edit = {"subject": rng.choice(COUNTRIES), "prompt": "The capital of {} is", "target": "Rome"}
        made = await self.call(client, "edit", "apply_edits", edits=[edit], method="rome", replace=True)
        if made and made["edit_ids"]:
            await self.call(client, "revert", "revert_edits", edit_ids=made["edit_ids"])

    async def leaves(self, client: Client, rng: random.Random) -> None:
        """Begins a long call and cancels it."""
        with anyio.move_on_after(rng.random() * 3):
            await client.call_tool("ask_model", {"prompt": "Once", "max_new_tokens": 1000})
        self.counts["left"] += 1

    async def one(self, number: int) -> None:
        """One client, until the time is up."""
        work = ([self.asks] * 6 + [self.reads] * 2 + [self.edits, self.leaves])[number % 10]
        rng, mode = random.Random(number), ("auto", "legacy")[number // 10 % 2]
        async with (
            httpx.AsyncClient(timeout=600) as http,
            Client(streamable_http_client(self.url, http_client=http), mode=mode) as client,
        ):
            await client.call_tool("model_status", {})
            await self.everybody()
            while not self.over:
                with anyio.move_on_after(self.end - time.monotonic() + 0.5):
                    await work(client, rng)

    async def half_open(self, number: int) -> None:
        """A connection that never finishes its headers, again and again; it ends when the server closes it."""
        host, _, port = self.url.partition("//")[2].partition("/")[0].partition(":")
        while not self.over:
            with suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                async with await anyio.connect_tcp(host, int(port)) as stream:
                    await stream.send(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"a" * number)
                    with anyio.move_on_after(max(0.0, min(20.0, self.end - time.monotonic()))):
                        await stream.receive()
                self.counts["half-open connections closed"] += 1

    async def lag(self) -> None:
        """How late the clock of this process is: what its own work, and the machine's, keep from it."""
        while not self.over:
            due = time.monotonic() + TICK
            await anyio.sleep(TICK)
            self.times["lag"].append(time.monotonic() - due)


async def _part(options: argparse.Namespace) -> dict[str, Any]:
    """The clients of one process; what they measured."""
    kinds = READERS if options.part == "readers" else WORKERS
    numbers = [n for n in range(options.clients) if n % 10 in kinds]
    measured = Load(options.url, len(numbers), options.seconds)
    async with anyio.create_task_group() as tasks:
        for number in numbers:
            tasks.start_soon(measured.one, number)
        await measured._all_there.wait()
        tasks.start_soon(measured.lag)
        if options.part == "workers":
            for number in range(options.clients):
                tasks.start_soon(measured.half_open, number)
    spent = psutil.Process().cpu_times()
    return {
        "seconds of each kind": {kind: _spread(times) for kind, times in sorted(measured.times.items())},
        "reads": _spread([t for kind, times in measured.times.items() if "_" in kind for t in times]),
        "slow reads in each tenth of the time": [measured.slow[tenth] for tenth in range(10)],
        "calls": dict(sorted(measured.counts.items())),
        "processor seconds": round(spent.user + spent.system, 1),
    }


def _spread(times: Sequence[float]) -> list[float]:
    """Median, 99 in 100, most."""
    if not times:
        return []
    return [round(v, 3) for v in (statistics.median(times), _share(times, 0.99), max(times))]


def _share(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


# --- the server -----------------------------------------------------------------------------------


def load(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The server and both groups of clients, each a process of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    if options.statistics:
        shutil.copytree(options.statistics, home / "statistics")
    given = {"model": options.model, "home": home, "port": port, "threads": options.threads}
    if options.models:
        given["models"] = options.models
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "server.py"), "--transport", "http", *flags],
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )
    try:
        return asyncio.run(_loaded(options, port, psutil.Process(process.pid)))
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


async def _loaded(options: argparse.Namespace, port: int, server: psutil.Process) -> dict[str, Any]:
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=30) as http:
        with anyio.fail_after(600):
            while not await _ready(http):
                await anyio.sleep(0.5)
    await _edit_once(base)
    before, memory, spent = os.getloadavg(), [megabytes(server)], cpu_spent(server)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_memory, server, memory, options.seconds / 10)
        groups = [_ClientGroup(options, part, base) for part in ("readers", "workers")]
        for group in groups:
            await anyio.to_thread.run_sync(group.wait_until_connected)
        parts = await asyncio.gather(*(anyio.to_thread.run_sync(group.go) for group in groups))
        tasks.cancel_scope.cancel()
    used = [round(now - then, 1) for now, then in zip(cpu_spent(server), spent, strict=True)]
    started = time.monotonic()
    async with Client(f"{base}/mcp") as client:
        await client.call_tool("ask_model", {"prompt": "Rome", "max_new_tokens": 1})
    answered, (idle, _) = time.monotonic() - started, cpu_spent(server)
    await anyio.sleep(5)
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        "load average, before and after": [before[0], os.getloadavg()[0]],
        "readers": parts[0],
        "workers": parts[1],
        "processor seconds of the server, and of its event loop": used,
        "first answer after all have left, seconds": round(answered, 2),
        "processor seconds of the server in the 5 s after that": round(cpu_spent(server)[0] - idle, 1),
        "memory of the server, MB": [*memory, megabytes(server)],
    }


async def _edit_once(base: str) -> None:
    """What the first edit computes once for a model is not the load's."""
    edit = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
    async with (
        httpx.AsyncClient(timeout=600) as http,
        Client(streamable_http_client(f"{base}/mcp", http_client=http)) as client,
    ):
        made = await client.call_tool("apply_edits", {"edits": [edit], "method": "rome"})
        assert made.structured_content, made.content
        await client.call_tool("revert_edits", {"edit_ids": made.structured_content["edit_ids"] or ["e1"]})


class _ClientGroup:
    """The process of one group of clients."""

    def __init__(self, options: argparse.Namespace, part: str, base: str) -> None:
        command = [sys.executable, "-m", "benchmarks.load", "--part", part, "--url", f"{base}/mcp"]
        command += ["--clients", str(options.clients), "--seconds", str(options.seconds)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True)

    def wait_until_connected(self) -> None:
        """Return when all of its clients are connected."""
        assert self._process.stdout
        said = self._process.stdout.readline().strip()
        assert said == READY, f"the clients could not connect: {said}"

    def go(self) -> dict[str, Any]:
        """Let them begin; what they measured."""
        result: dict[str, Any] = json.loads(self._process.communicate("go\n")[0])
        return result


async def _ready(http: httpx.AsyncClient) -> bool:
    with suppress(httpx.TransportError):
        return bool((await http.get("/ready")).status_code == 200)
    return False


if __name__ == "__main__":
    main()
