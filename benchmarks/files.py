"""Files of the field's data sets as an agent uses them: saved, corrected, and measured by their own metrics.

    python -m benchmarks.files knowedit/*.json mquake/mquake_cf_subset.json -n 20
    python -m benchmarks.files counterfact_500.json -n 100 --one-by-one
    python -m benchmarks.files counterfact_500.json -n 100 --policy '{"goal": "export"}'

Each file goes in as it is: the first `-n` of its records through save_facts, then correct_facts, over MCP, on a home
of its own. The table has what the report says: edit success, the data set's kinds of questions and what the unedited
model answers, fluency; beside it what it cost. --one-by-one corrects one fact after another on top of each other.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mcp import Client

from benchmarks.fact_set_story import Agent
from errata import build
from server.request_context import RequestContext
from server.settings import Settings
from server.startup import Startup


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", type=Path, nargs="+", help="KnowEdit, MQuAKE, RippleEdits, CounterFact, zsRE ..."
    )
    parser.add_argument("-n", type=int, default=20, help="records of each file (default 20)")
    parser.add_argument("--skip", type=int, default=0, help="records to leave out first")
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument(
        "--keep", type=Path, help="folder of what is computed once for a model, for the next run"
    )
    parser.add_argument("--policy", type=json.loads, default={}, help="of correct_facts, as JSON")
    parser.add_argument("--one-by-one", action="store_true", help="a call for each fact, measured at the end")
    parser.add_argument("--out", type=Path, help="JSON Lines file of the reports")
    options = parser.parse_args()
    for file in options.files:
        with tempfile.TemporaryDirectory() as home:
            report = asyncio.run(measured(file, options, Path(home)))
        print(table(report), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(report, ensure_ascii=False) + "\n")


async def measured(file: Path, options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The report of one file, corrected on a new home."""
    for kept in ("statistics", "relations") if options.keep else ():
        (options.keep / kept).mkdir(parents=True, exist_ok=True)
        (home / kept).symlink_to((options.keep / kept).absolute(), target_is_directory=True)
    (home / "data").mkdir()
    name = first_records(file, options.skip, options.n, home / "data")
    settings = Settings(model=options.model, home=home, models=options.models)
    startup = Startup(settings)
    startup.begin()
    services = await startup.services(RequestContext())
    try:
        async with Client(build(settings, startup), mode="auto") as client:
            agent = Agent(client)
            saved = await agent.call("save_facts", name="a-file", path=name, partial=True)
            busy, begun = time.process_time(), time.monotonic()
            policy = options.policy | ({"batch": 1} if options.one_by_one else {})
            report = await agent.call("correct_facts", set="a-file", policy=policy, wait_seconds=600)
            if report["status"] in ("queued", "running"):
                job = await agent.wait({"state": "running"}, report["job_id"])
                report = job["result"] or {"status": job["state"], "summary": job["message"]}
            cost = {"CPU s": round(time.process_time() - busy, 1), "s": round(time.monotonic() - begun, 1)}
    finally:
        await asyncio.to_thread(startup.close, 30)
    del services
    return {
        "file": file.name,
        "model": options.model,
        "saved": saved["summary"],
        "cost": cost,
        "report": report,
    }


def first_records(file: Path, skip: int, n: int, folder: Path) -> str:
    """Write some records of a JSON or JSON Lines file, each as it is; returns the name of the new file."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text("utf-8")
    whole = text.lstrip().startswith("[")
    records = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    name = file.name.removesuffix(".gz")
    lines = json.dumps(records[skip : skip + n], ensure_ascii=False)
    if not whole:
        lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records[skip : skip + n])
    (folder / name).write_text(lines, "utf-8")
    return name


def table(report: dict[str, Any]) -> str:
    """The report of one file in lines."""
    told, cost = report["report"], report["cost"]
    lines = [f"{report['file']}, {report['model']}: {report['saved']} {told['summary']}"]
    for metric, value in told.get("data_set", {}).items():
        rate = value.get("rate", value.get("mean"))
        before = f", unedited {value['before']:.3f}" if value.get("before") is not None else ""
        shown = "   -  " if rate is None else f"{rate:6.3f}"
        lines.append(f"  {metric:<26}{shown}  of {value['of']}{before}")
    for name, rate in told.get("measured", {}).items():
        lines.append(f"  {name:<26}{rate:6.3f}  (of the edits, by wordings and facts of our own)")
    tried = sum(told.get("outcomes", {}).get(name, {}).get("count", 0) for name in ("done", "failed"))
    each = f", {cost['CPU s'] / tried:.1f} for each fact that was tried" if tried else ""
    lines.append(
        f"  perplexity x {told.get('perplexity_ratio')}; {cost['CPU s']} CPU seconds{each}; {cost['s']} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
