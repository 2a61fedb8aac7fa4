"""Many clients that ask at once: tokens a second of joint batches beside one client and plain `generate`.

    python -m benchmarks.clients [--model default] [--clients 16] [--tokens 48] [--rounds 3] [--memories]

With --memories every prompt is answered by one of a few memories.
Asks through the services, in this process: one client, many clients and plain `generate` in turn, so that a busy
machine slows all of them; it says whether the texts are those of asking alone. `benchmarks.load` has the whole server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

COUNTRIES = tuple(
    "France Japan Italy Spain Peru Kenya Chile Cuba Iran Iraq Oman Laos Nepal Mali Togo Fiji".split()  # noqa: SIM905
)

MEMORIES = 4


def options_of(about: str | None) -> argparse.Namespace:
    """The command line of a benchmark with many clients."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memories", action="store_true", help="answers come from memories (clients alone)")
    return parser.parse_args()


def main() -> None:
    options = options_of(__doc__)
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(batch(options, Path(home)), indent=1))


def batch(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Tokens a second, interleaved, and whether the texts agree."""
    from editors.edit import Edit
    from server.models.devices import prepare_environment
    from server.models.loading import load as load_model
    from server.services import Services
    from server.settings import Settings
    from store import Ledger

    settings = Settings(model=options.model, home=home, models=options.models, threads=options.threads)
    prepare_environment(settings)
    ledger = Ledger.open(home)
    services = Services.open(settings, load_model(settings, _quiet), ledger, _quiet)
    n = options.clients
    prompts = [f"The history of {COUNTRIES[i % len(COUNTRIES)]} is {i}" for i in range(n)]
    lm = services.workspace.lm
    if options.memories:
        edits = [Edit(subject=c, prompt="The capital of {} is", target="Lima") for c in COUNTRIES[:MEMORIES]]
        services.edits.apply(edits, method="constrained")
        prompts = [edits[i % len(edits)].text for i in range(n)]

    async def ask(texts: list[str]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(services.facts.ask_with_others(text, options.tokens) for text in texts)
        )
        seconds = time.perf_counter() - started
        return sum(a.tokens for a in answers) / seconds, [a.completion for a in answers]

    def generate(texts: list[str]) -> tuple[float, list[str]]:
        started = time.perf_counter()
        with services.workspace.turn():
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


if __name__ == "__main__":
    main()
