"""Many clients at once: tokens a second of joint batches beside plain `generate`, and the whole server under load.

    python -m benchmarks.clients batch [--model default] [--clients 16] [--tokens 48] [--rounds 3]
    python -m benchmarks.clients load [--model default] [--clients 100] [--seconds 60]

`batch` asks through the services, in this process: one client, many clients and plain `generate` in turn, so that a
busy machine slows all of them; it says whether the texts are those of asking alone. `load` starts the real server and
talks to it over HTTP: six in ten clients ask and check facts, two read, one edits and reverts, one leaves in the
middle of a call again and again. It reports how long reads take, whether anything goes on when all have left, and the
memory of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import psutil
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

COUNTRIES = tuple(
    "France Japan Italy Spain Peru Kenya Chile Cuba Iran Iraq Oman Laos Nepal Mali Togo Fiji".split()  # noqa: SIM905
)
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("batch", "load"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        result = batch(options, Path(home)) if options.what == "batch" else load(options, Path(home))
    print(json.dumps(result, indent=1))


# --- joint batches ------------------------------------------------------------------------------


def batch(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Tokens a second, interleaved, and whether the texts agree."""
    from server.models.devices import prepare_environment
    from server.models.loading import load as load_model
    from server.services import Services
    from server.settings import Settings
    from store import Ledger

    settings = Settings(model=options.model, home=home, models=options.models, threads=options.threads)
    prepare_environment(settings)
    ledger = Ledger.open(home)
    services = Services.open(settings, load_model(settings, _quiet), ledger, _quiet)
    n = options.clients or 16
    prompts = [f"The history of {COUNTRIES[i % len(COUNTRIES)]} is {i}" for i in range(n)]
    lm = services.workspace.lm

    async def ask(texts: list[str]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(services.facts.ask_with_others(text, options.tokens) for text in texts)
        )
        seconds = time.perf_counter() - started
        return sum(a.tokens for a in answers) / seconds, [a.completion for a in answers]

    def generate(texts: list[str]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        answers = lm.generate([lm.prompt(text, chat=False) for text in texts], options.tokens)
        seconds = time.perf_counter() - started
        return sum(a.tokens for a in answers) / seconds, [a.text for a in answers]

    rates: dict[str, list[float]] = defaultdict(list)
    asyncio.run(ask(prompts[:2]))
    for i in range(options.rounds):
        rates["one client"].append(asyncio.run(ask(prompts[i : i + 1]))[0])
        rates["generate, one prompt"].append(generate(prompts[i : i + 1])[0])
        rate, texts = asyncio.run(ask(prompts))
        rates["many clients"].append(rate)
        rates["generate, one batch"].append(generate(prompts)[0])
    alone = [generate([prompt])[1][0] for prompt in prompts]
    services.close()
    ratios = [many / one for many, one in zip(rates["many clients"], rates["one client"], strict=True)]
    return {
        "clients": n,
        "tokens a second": {name: [round(r, 1) for r in values] for name, values in rates.items()},
        "many to one": [round(r, 2) for r in ratios],
        "median": round(statistics.median(ratios), 2),
        "same text as alone": f"{sum(a == b for a, b in zip(texts, alone, strict=True))} of {n}",
    }


def _quiet(*_: object) -> None:
    return None


# --- the server under load ----------------------------------------------------------------------


class Load:
    """What the clients measured."""

    def __init__(self, url: str, clients: int, seconds: float) -> None:
        self.url, self.seconds, self.end = url, seconds, float("inf")
        self._missing, self._all_there = clients, anyio.Event()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    async def _everybody(self) -> None:
        """Wait until all clients are connected, so that only what they do then is measured."""
        self._missing -= 1
        if not self._missing:
            self.end = time.monotonic() + self.seconds
            self._all_there.set()
        await self._all_there.wait()

    async def call(self, client: Client, kind: str, tool: str, **given: Any) -> Any:
        started = time.monotonic()
        result = await client.call_tool(tool, given)
        self.times[kind].append(time.monotonic() - started)
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
            await self.call(client, "ask", "check_facts", facts=facts)

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
            await self.call(client, "edit", "revert_edits", edit_ids=made["edit_ids"])

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
            await self._everybody()
            while not self.over:
                with anyio.move_on_after(self.end - time.monotonic() + 0.5):
                    await work(client, rng)


def load(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The server as a process of its own, and its clients in this one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    given = {"model": options.model, "home": home, "port": port, "threads": options.threads}
    if options.models:
        given["models"] = options.models
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    log = (home / "server.log").open("wb")
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
    base, n = f"http://127.0.0.1:{port}", options.clients or 100
    async with httpx.AsyncClient(base_url=base, timeout=30) as http:
        with anyio.fail_after(600):
            while not await _ready(http):
                await anyio.sleep(0.5)
        measured = Load(f"{base}/mcp", n, options.seconds)
        before = server.memory_info().rss
        async with anyio.create_task_group() as tasks:
            for number in range(n):
                tasks.start_soon(measured.one, number)
        started = time.monotonic()
        async with Client(f"{base}/mcp") as client:
            await client.call_tool("ask_model", {"prompt": "Rome", "max_new_tokens": 1})
        return {
            "clients": n,
            "seconds": options.seconds,
            "seconds of each kind (median, 99 in 100, most)": {
                kind: [round(v, 3) for v in (statistics.median(t), _share(t, 0.99), max(t))]
                for kind, t in sorted(measured.times.items())
            },
            "calls": dict(sorted(measured.counts.items())),
            "first answer after all have left, seconds": round(time.monotonic() - started, 2),
            "memory of the server, MB": [round(before / 1e6), round(server.memory_info().rss / 1e6)],
        }


async def _ready(http: httpx.AsyncClient) -> bool:
    with suppress(httpx.TransportError):
        return bool((await http.get("/ready")).status_code == 200)
    return False


def _share(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


if __name__ == "__main__":
    main()
