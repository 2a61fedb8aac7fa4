"""How long the board's pages take with thousands of edits, in a real browser.

    python -m benchmarks.board [--edits 10000] [--times 15] [--json FILE]

A home with so many edits, as many facts of a set, and hundreds of proposals, jobs, traces and vectors is shown by
`errata-mcp board`; Chromium opens every page, the last pages of the long lists among them. Of each, in milliseconds:
from the request to the last byte of the answer, and from the start of the navigation to the first paint, as (median,
90 in 100, most); and the server's processor time. A new browser context is used each time, so that nothing is cached.
The load average stands above the table, since a busy machine answers later. Needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.many_edits import fill, fill_beside
from tests.server.browsers import CHROMIUM, DEEP, PAGES
from tests.server.processes import ROOT, free_port, listening

GOAL_PAGE, GOAL_PAINT = 200, 1_000
"""Milliseconds."""
_ANSWERED = "performance.getEntriesByType('navigation').map((n) => n.responseEnd - n.requestStart)[0]"
_PAINTED = "performance.getEntriesByName('first-contentful-paint').map((p) => p.startTime)[0]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=15, help="how often each page is opened")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with board(options.edits) as url:
        found = measured(url, options.times)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


@contextmanager
def board(edits: int) -> Iterator[str]:
    """The address of a board over a home with so many edits."""
    with tempfile.TemporaryDirectory() as folder:
        home, port = fill_beside(fill(Path(folder) / "home", edits), edits), free_port()
        command = (str(ROOT / "server.py"), "board", "--home", str(home), "--port", str(port), "--no-open")
        with listening(*command, url=f"http://127.0.0.1:{port}") as url:
            yield url


def measured(url: str, times: int) -> dict[str, dict[str, list[float]]]:
    """For each page the milliseconds of its answer and of its first paint."""
    from playwright.sync_api import sync_playwright

    trace = re.search(r"/board/maps/\d+", urllib.request.urlopen(f"{url}/board/maps").read().decode())
    paths = [*PAGES.values(), *([trace[0]] if trace else []), *DEEP]
    found: dict[str, dict[str, list[float]]] = {
        path: {"answer": [], "paint": [], "processor": []} for path in paths
    }
    server = next(each for each in psutil.Process().children() if "board" in each.cmdline())
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(times):
            for path, took in found.items():
                begun = sum(server.cpu_times()[:2])
                answer, paint = _opened(browser, url + path)
                took["processor"].append(1_000 * (sum(server.cpu_times()[:2]) - begun))
                took["answer"].append(answer)
                took["paint"].append(paint)
        browser.close()
    return found


def _opened(browser: Any, url: str) -> tuple[float, float]:
    """Milliseconds to the last byte and to the first paint of a page that nothing is cached of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(url)
    begun = time.monotonic()
    while (paint := page.evaluate(_PAINTED)) is None and time.monotonic() - begun < 10:
        page.wait_for_timeout(20)
    answer = page.evaluate(_ANSWERED)
    context.close()
    return float(answer), float(paint if paint is not None else 10_000)


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The figures as Markdown."""
    lines = [
        f"load average {os.getloadavg()[0]:.1f}; wanted: answer < {GOAL_PAGE} ms, first paint < {GOAL_PAINT} ms",
        "",
        "| page | answer ms: median, 90 in 100, most | first paint ms | processor ms |",
        "| --- | --- | --- | --- |",
    ]
    for path, took in found.items():
        cells = [_spread(took[name]) for name in ("answer", "paint", "processor")]
        lines.append(f"| `{path}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    ninety = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return f"{statistics.median(ordered):.0f}, {ninety:.0f}, {ordered[-1]:.0f}"


if __name__ == "__main__":
    main()
