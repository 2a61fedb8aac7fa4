"""A list of facts put right by an agent through the tools: calls, tokens of the answers, time, and what is right.

    python -m benchmarks.fact_set_story [--model default] [--models FOLDER] [--facts 200] [--stale 30] [--pairs 5]

The list is a CSV with headers of its own and four relations. Most rows are what the model says already, `stale` rows
say something else, and each of the `pairs` is two rows that contradict each other. Two facts of the list were edited
by hand before, one of them against the list. The agent is a program that takes the calls which the answers advise.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mcp import Client

from editors.facts import relations
from errata import build
from server.request_context import RequestContext
from server.settings import Settings
from server.startup import Startup

RELATIONS = {
    "capital": "The capital of {} is",
    "official language": "The official language of {} is",
    "currency": "The currency of {} is the",
    "country of a place": "{} is located in the country of",
}
HEADER = ("Thema", "Eigenschaft", "Wert", "Stand")
COLUMNS = {"subject": "Thema", "relation": "Eigenschaft", "answer": "Wert", "as_of": "Stand"}


class Agent:
    """A client that counts what its calls cost."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.calls: list[tuple[str, int, float]] = []

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """What a tool answers; its text counts as characters / 4."""
        started = time.monotonic()
        result = await self._client.call_tool(tool, arguments)
        sent = len(json.dumps(arguments, ensure_ascii=False)) // 4
        text = "".join(getattr(block, "text", "") for block in result.content)
        shown = max(len(text), len(json.dumps(result.structured_content or {}, ensure_ascii=False))) // 4
        self.calls.append((tool, sent + shown, time.monotonic() - started))
        if result.is_error:
            raise SystemExit(f"{tool}: {text}")
        return dict(result.structured_content or {})

    async def wait(self, answer: dict[str, Any], job_id: str) -> dict[str, Any]:
        """The result of a job once it is over."""
        while answer.get("state") in ("queued", "running"):
            answer = await self.call("get_job", job_id=job_id, wait_seconds=600)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--stale", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=json.loads, default={}, help="of correct_facts, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(asyncio.run(measured(options, Path(home))), indent=1, ensure_ascii=False))


async def measured(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The story on a server in this process."""
    settings = Settings(model=options.model, home=home, models=options.models)
    startup = Startup(settings)
    startup.begin()
    services = await startup.services(RequestContext())
    try:
        async with Client(build(settings, startup), mode="auto") as client:
            rows, stale = await prepared(Agent(client), home, options)
            agent = Agent(client)
            outcome = await story(agent, options.policy)
            right = await judged(Agent(client), rows, stale)
    finally:
        await asyncio.to_thread(startup.close, 30)
    del services
    costs: Counter[str] = Counter()
    for tool, cost, _ in agent.calls:
        costs[tool] += cost
    return {
        "calls": len(agent.calls),
        "tokens": sum(costs.values()),
        "by_tool": dict(costs),
        "seconds": {tool: round(seconds, 1) for tool, _, seconds in agent.calls},
        "right": right,
        "correction": outcome,
    }


async def prepared(agent: Agent, home: Path, options: argparse.Namespace) -> tuple[list[list[str]], set[str]]:
    """Write the list for what this model knows, and edit two facts by hand; the rows, and the stale prompts."""
    rng = random.Random(options.seed)
    pool = [
        (subject, r.name, answer) for r in relations() if r.name in RELATIONS for subject, answer in r.facts
    ]
    known: list[tuple[str, str, str]] = []
    for start in range(0, len(pool), 400):
        part = pool[start : start + 400]
        facts = [{"subject": s, "prompt": RELATIONS[r], "expected": a} for s, r, a in part]
        answer = await agent.call("check_facts", facts=facts)
        known += [
            fact for fact, check in zip(part, answer["facts"], strict=True) if check["verdict"] == "agrees"
        ]
    rng.shuffle(known)
    rows = [list(fact) for fact in known[: options.facts - options.pairs]]
    for row in rows[: options.stale]:
        others = sorted({a for _, r, a in pool if r == row[1]} - {row[2]})
        row[2] = rng.choice(others)
    stale = {RELATIONS[row[1]].replace("{}", row[0]) for row in rows[: options.stale]}
    for row in rows[options.stale : options.stale + options.pairs]:
        others = sorted({a for _, r, a in pool if r == row[1]} - {row[2]})
        rows.append([row[0], row[1], rng.choice(others)])
    by_hand = [
        {"subject": row[0], "prompt": RELATIONS[row[1]], "target": target}
        for row, target in ((rows[0], rows[0][2]), (rows[1], rows[2][2]))
    ]
    await agent.call("apply_edits", edits=by_hand, partial=True, reason="by hand")
    rng.shuffle(rows)
    (home / "data").mkdir(exist_ok=True)
    with (home / "data" / "wissen.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(HEADER)
        writer.writerows([*row, "2026-11-01"] for row in rows)
    return rows, stale


async def story(agent: Agent, policy: dict[str, Any]) -> dict[str, Any]:
    """The agent's conversation; the report of the correction."""
    await agent.call("save_facts", name="wissen", path="wissen.csv", columns=COLUMNS, template=RELATIONS)
    checked = (await agent.call("check_facts", set="wissen", wait_seconds=600))["set"]
    await agent.wait(checked, checked["job_id"])
    report = await agent.call("correct_facts", set="wissen", policy=policy, wait_seconds=600)
    if report["status"] in ("queued", "running"):
        report = (await agent.wait({"state": "running"}, report["job_id"]))["result"]
    for kind in ("failed", "lost", "skipped"):
        if kind in report["outcomes"]:
            await agent.call("show_fact_set", name="wissen", kind=kind, limit=40)
    await agent.call("check_facts", set="wissen", wait_seconds=600)
    await agent.call("export_fact_set", name="wissen")
    return report


async def judged(agent: Agent, rows: list[list[str]], stale: set[str]) -> dict[str, str]:
    """What the model says in the end, of the stale facts and of those that were right."""
    seen = Counter((row[0], row[1]) for row in rows)
    single = [row for row in rows if seen[row[0], row[1]] == 1]
    counts: dict[str, list[bool]] = {"stale": [], "others": []}
    for start in range(0, len(single), 400):
        part = single[start : start + 400]
        facts = [{"subject": s, "prompt": RELATIONS[r], "expected": a} for s, r, a in part]
        answer = await agent.call("check_facts", facts=facts)
        for row, check in zip(part, answer["facts"], strict=True):
            kind = "stale" if RELATIONS[row[1]].replace("{}", row[0]) in stale else "others"
            counts[kind].append(check["verdict"] == "agrees")
    return {kind: f"{sum(held)} of {len(held)}" for kind, held in counts.items()}


if __name__ == "__main__":
    main()
