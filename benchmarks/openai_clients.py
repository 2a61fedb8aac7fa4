"""OpenAI clients at the real server: tokens a second of many clients beside one, and the
time to the first token of a stream on an idle server; plain `generate` in this process for comparison.

    python -m benchmarks.openai_clients [--model default] [--models FOLDER] [--clients 16] [--tokens 48] [--rounds 3]

One server process, the official `openai` client; one client, all of them and plain `generate` in turn, so that a busy
machine slows all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from benchmarks.clients import options_of

ROOT = Path(__file__).resolve().parent.parent
STREAMS = 9
"""Streams whose first token is timed."""


def main() -> None:
    options = options_of(__doc__)
    with tempfile.TemporaryDirectory() as home, server(options, Path(home)) as url:
        print(json.dumps(asyncio.run(measured(url, options, plain(options, Path(home)))), indent=1))


def plain(options: argparse.Namespace, home: Path) -> Callable[[list[str]], float]:
    """Tokens a second of plain `generate` for some prompts in one batch, in this process."""
    from server.models.devices import prepare_environment
    from server.models.loading import load
    from server.settings import Settings

    settings = Settings(model=options.model, home=home, models=options.models, threads=options.threads)
    prepare_environment(settings)
    lm = load(settings, lambda *_: None)

    def rate_of(prompts: list[str]) -> float:
        started = time.perf_counter()
        said = lm.generate([lm.prompt(text, chat=False) for text in prompts], options.tokens)
        return sum(one.tokens for one in said) / (time.perf_counter() - started)

    return rate_of


@contextmanager
def server(options: argparse.Namespace, home: Path) -> Iterator[str]:
    """The server as a process of its own; gives the address of /v1 when the model is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given: dict[str, Any] = {
        "model": options.model,
        "home": home,
        "transport": "http",
        "port": port,
        "threads": options.threads,
    }
    if options.models:
        given["models"] = options.models
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "server.py", *flags], cwd=ROOT, env=dict(os.environ), stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


async def measured(
    url: str, options: argparse.Namespace, generate: Callable[[list[str]], float]
) -> dict[str, Any]:
    """The figures."""
    rates: dict[str, list[float]] = defaultdict(list)
    prompts = [f"The history of the country number {i} is" for i in range(options.clients)]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=20, timeout=300) as client:
        await rate(client, prompts[:2], options.tokens)
        for i in range(options.rounds):
            rates["one client"].append(await rate(client, prompts[i : i + 1], options.tokens))
            rates["generate, one prompt"].append(generate(prompts[i : i + 1]))
            rates["many clients"].append(await rate(client, prompts, options.tokens))
            rates["generate, one batch"].append(generate(prompts))
        first = [await first_token(client, i) for i in range(STREAMS)]
    ratios = [many / one for many, one in zip(rates["many clients"], rates["one client"], strict=True)]
    return {
        "clients": options.clients,
        "tokens a second": {name: [round(r, 1) for r in values] for name, values in rates.items()},
        "many to one": [round(r, 2) for r in ratios],
        "median": round(statistics.median(ratios), 2),
        "seconds to the first token": {
            "median": round(statistics.median(first), 3),
            "greatest": round(max(first), 3),
        },
    }


async def rate(client: openai.AsyncOpenAI, prompts: list[str], tokens: int) -> float:
    """Tokens a second of one client for each prompt."""
    started = time.perf_counter()
    made = [
        client.completions.create(model="errata", prompt=prompt, max_tokens=tokens, temperature=0)
        for prompt in prompts
    ]
    answers = await asyncio.gather(*made)
    written = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    return written / (time.perf_counter() - started)


async def first_token(client: openai.AsyncOpenAI, number: int) -> float:
    """Seconds until the first text of a chat's stream."""
    started = time.perf_counter()
    messages: Any = [{"role": "user", "content": f"Tell me of the number {number}."}]
    stream = await client.chat.completions.create(
        model="errata", messages=messages, stream=True, max_tokens=8
    )
    seconds = 0.0
    async for chunk in stream:
        if not seconds and chunk.choices and chunk.choices[0].delta.content:
            seconds = time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
