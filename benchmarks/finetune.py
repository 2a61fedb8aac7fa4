"""Fine-tuning and memory editors beside ROME: quality, perplexity and CPU seconds, one fact at a time.

    python -m benchmarks.finetune [--facts check] [--n 30] [--methods rome,ft,lora,grace,wise,in_context]

Methods see the bare fact alone; its paraphrases and neighbours are only measured. With `--probes`
they are given to the method too, as an agent would; what the method then trains on is left out of the rates, and a
rate of which nothing is left is shown as "-". Statistics are made before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.facts import Fact, load

Row = dict[str, float | None]
"""What was measured of one fact; None where nothing was left to measure it with."""
COLUMNS = ("reliability", "generality", "locality", "question", "perplexity", "cpu_seconds")


def main() -> None:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    bench = Bench(options)
    facts = load(options.facts)
    facts = facts[:: max(1, len(facts) // options.n)][: options.n]
    rows: dict[str, list[Row]] = {m: [] for m in options.methods}
    for fact in facts:
        for method in options.methods:
            rows[method].append(bench.run(method, fact))
            told = " ".join(f"{k}={_cell(v, 2)}" for k, v in rows[method][-1].items())
            print(f"{method} {fact.edit.subject}: {told}", file=sys.stderr, flush=True)
    report = {m: _summary(found) for m, found in rows.items()}
    print(_table(report, options, len(facts)))
    if options.json:
        Path(options.json).write_text(json.dumps({"summary": report, "rows": rows}, indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", choices=("tune", "check"), default="check")
    parser.add_argument("--n", type=int, default=30, help="facts edited, spread over the file (default 30)")
    parser.add_argument(
        "--methods",
        type=lambda s: s.split(","),
        default=["rome", "ft", "lora", "grace", "wise", "in_context"],
    )
    parser.add_argument("--probes", action="store_true", help="give paraphrases and neighbours to the method")
    parser.add_argument("--params", type=json.loads, default={}, help='JSON: {"lora": {"rank": 8}}')
    parser.add_argument("--model", default="default")
    parser.add_argument("--home", type=Path, default=None, help="where model and statistics are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write everything to this file")
    return parser.parse_args()


class Bench:
    """The loaded model, and its statistics where a method needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from editors import METHODS
        from editors.canaries import Canaries
        from editors.moments import Statistics
        from server.models.loading import load as load_model
        from server.settings import Settings
        from server.transaction.host import ModelHost

        chosen = {"model": options.model, "device": "cpu", "threads": options.threads}
        settings = Settings(**chosen | ({"home": options.home} if options.home else {}))
        self.lm = load_model(settings, lambda *_: None)
        self.probes, self.methods = options.probes, METHODS
        self.host = ModelHost(self.lm)
        self.statistics = Statistics(settings.home / "statistics", self.host.base_hash)
        self.params: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        for name in options.methods:
            editor = METHODS[name]
            self.params[name] = editor.resolve(self.lm, editor.params(**options.params.get(name, {})))
            editor.ensure_statistics(self.lm, self.params[name], self.statistics)
        self.canaries = Canaries(self.lm)

    def run(self, method: str, fact: Fact) -> Row:
        """Compute one edit on the pristine model (timed), then measure it and the whole model."""
        from editors.edit import Probe
        from editors.measure import observe
        from editors.method import EditContext
        from editors.outcomes import outcomes

        bare = {} if self.probes else {"paraphrases": (), "neighbours": ()}
        given = fact.edit.model_copy(update=bare)
        asked = fact.edit.model_copy(
            update={"portability": (Probe(prompt=fact.question, answer=fact.edit.target),)}
        )
        if fact.edit.text not in self.before:  # the same for every method
            self.before[fact.edit.text] = observe(self.lm, [asked])
        before = self.before[fact.edit.text]
        start = time.process_time()
        patch = self.methods[method].compute(
            self.lm, [given], self.params[method], EditContext(self.statistics)
        )
        seconds = time.process_time() - start
        trained = self.methods[method].trained_prompts(patch, [given], self.params[method])
        with self._on(method, patch):
            outcome = outcomes([asked], before, observe(self.lm, [asked]), trained=[trained])[0]
            drift = self.canaries.drift(self.lm)
        return {
            "reliability": outcome.reliability,
            "generality": outcome.rate("paraphrase"),
            "locality": outcome.rate("neighbour"),
            "question": outcome.rate("portability"),
            "perplexity": drift.perplexity_after / drift.perplexity_before,
            "cpu_seconds": seconds,
        }

    @contextmanager
    def _on(self, method: str, patch: Any) -> Iterator[None]:
        from server.transaction.host import ActivePatch

        self.host.set_stack([ActivePatch(1, 1, method, patch, (0,), "")])
        try:
            yield
        finally:
            self.host.set_stack([])


def _summary(rows: Sequence[Row]) -> Row:
    """Means over the facts that have the rate; of the seconds the median, of the perplexity ratio also the greatest."""
    values = {c: [value for row in rows if (value := row[c]) is not None] for c in COLUMNS}
    found: Row = {c: statistics.fmean(values[c]) if values[c] else None for c in COLUMNS[:-1]}
    found["worst perplexity"] = max(values["perplexity"])
    return found | {"CPU s (median)": statistics.median(values["cpu_seconds"])}


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(report: dict[str, Row], options: argparse.Namespace, n: int) -> str:
    given = "with their probes" if options.probes else "bare"
    lines = [f"{n} facts of {options.facts}, {given}, one at a time; perplexity is after / before"]
    head = ["method", *next(iter(report.values()))]
    body = [[m, *(_cell(v, 3) for v in row.values())] for m, row in report.items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines += [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *body]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
