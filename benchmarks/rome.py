"""Our ROME against the plain implementation of its paper: CPU seconds, memory and quality.

    python -m benchmarks.rome [--facts check] [--n 30] [--plain-n 5] [--threads 1] [--json FILE]

Both run interleaved in one process over the same facts, on the same layer with the same second
moment. The plain one takes a minute or more an edit, so by default it does every sixth fact;
quality of both is shown over the facts that both did, and ours over all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.facts import Fact, load

COLUMNS = ("reliability", "generality", "locality", "question", "probability")


@dataclass(frozen=True)
class Run:
    """One edit by one implementation."""

    subject: str
    cpu_seconds: float
    peak_rss: int  # bytes, of the whole process while it was computed
    quality: dict[str, float]


def main() -> None:
    options = _options()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options)
    facts = load(options.facts)[: options.n]
    every = max(1, len(facts) // options.plain_n) if options.plain_n else len(facts) + 1
    runs: dict[str, list[Run]] = {"ours": [], "plain": []}
    for i, fact in enumerate(facts):
        runs["ours"].append(bench.run(fact, bench.ours))
        if i % every == 0 and len(runs["plain"]) < options.plain_n:
            runs["plain"].append(bench.run(fact, bench.plain))
        print(f"{i + 1}/{len(facts)} {fact.edit.subject}", file=sys.stderr, flush=True)
    report = _report(options, bench, runs)
    print(_table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", choices=("tune", "check"), default="check")
    parser.add_argument("--n", type=int, default=30, help="facts edited (default 30)")
    parser.add_argument(
        "--plain-n", type=int, default=5, help="of them also by the plain one (default 5; 0: none)"
    )
    parser.add_argument(
        "--plain-frozen", action="store_true", help="the plain one without gradients of weights"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--home", type=Path, default=None, help="where model and statistics are kept")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of RomeParams for ours")
    parser.add_argument("--json", help="also write the report to this file")
    return parser.parse_args()


class Bench:
    """The loaded model, its second moment, and both implementations on the same layer."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.plain_rome import PlainParams, PlainRome
        from editors.closed_form.rome import Rome, RomeParams
        from editors.method import EditContext
        from editors.moments import Statistics

        self.lm, home = _model(options)
        self.editor = Rome()
        self.params = self.editor.resolve(self.lm, RomeParams(**options.params))
        assert self.params.layer is not None
        moments = Statistics(home / "statistics", f"benchmark-{re.sub(r'[^A-Za-z0-9]+', '-', self.lm.name)}")
        start = time.process_time()
        moments.ensure(self.lm, [self.params.layer], lambda *_: None)
        self.statistics_seconds = time.process_time() - start
        self.context = EditContext(moments)
        if self.params.mode == "full":
            moments.metric(
                self.params.layer, self.params.ridge, self.params.sample
            )  # as a warm server has it
        self.baseline: Any = None
        if options.plain_n:
            plain = PlainParams(layer=self.params.layer, frozen=options.plain_frozen)
            self.baseline = PlainRome(self.lm, moments.get(self.params.layer).matrix, plain)

    def ours(self, fact: Fact) -> Any:
        return self.editor.compute(self.lm, [fact.edit], self.params, self.context)

    def plain(self, fact: Fact) -> Any:
        return self.baseline.compute(fact.edit)

    def run(self, fact: Fact, method: Callable[[Fact], Any]) -> Run:
        """Compute one edit, then measure it on the patched model; only the computing is timed."""
        _reset_peak()
        start = time.process_time()
        patch = method(fact)
        seconds = time.process_time() - start
        return Run(fact.edit.subject, seconds, _peak_rss(), self.quality(fact, patch))

    def quality(self, fact: Fact, patch: Any) -> dict[str, float]:
        """Rates by greedy generation; `question` is the fact asked through the chat template."""
        from editors.edit import Probe
        from editors.measure import observe
        from editors.outcomes import outcomes
        from editors.patch import join_deltas

        probe = Probe(prompt=fact.question, answer=fact.edit.target)
        edit = fact.edit.model_copy(update={"portability": (probe,)})
        before = observe(self.lm, [edit])
        with self.lm.patched(join_deltas([patch])):
            after = observe(self.lm, [edit])
        outcome = outcomes([edit], before, after)[0]
        return {
            "reliability": outcome.reliability,
            "generality": outcome.rate("paraphrase") or 0.0,
            "locality": outcome.rate("neighbour") or 0.0,
            "question": outcome.rate("portability") or 0.0,
            "probability": outcome.p_target_after,
        }


def _model(options: argparse.Namespace) -> tuple[Any, Path]:
    from server.models.loading import load as load_model
    from server.settings import Settings

    chosen = {"model": options.model, "device": "cpu", "threads": options.threads}
    settings = Settings(**chosen | ({"home": options.home} if options.home else {}))
    return load_model(settings, lambda *_: None), settings.home


def _reset_peak() -> None:
    """Give freed memory back and let the kernel forget the peak (on Linux; elsewhere it is the process')."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _report(options: argparse.Namespace, bench: Bench, runs: dict[str, list[Run]]) -> dict[str, Any]:
    shared = {r.subject for r in runs["plain"]}
    rows = {"ours": _summary(runs["ours"])}
    if shared:
        rows["ours, same facts"] = _summary([r for r in runs["ours"] if r.subject in shared])
        rows["plain"] = _summary(runs["plain"])
        ratio = rows["plain"]["cpu_seconds"] / rows["ours, same facts"]["cpu_seconds"]
    return {
        "model": bench.lm.name,
        "layer": bench.params.layer,
        "facts": options.facts,
        "threads": options.threads,
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "statistics_cpu_seconds": round(bench.statistics_seconds, 1),
        "times_cheaper": round(ratio, 1) if shared else None,
        "summary": rows,
        "runs": {name: [vars(r) for r in made] for name, made in runs.items()},
    }


def _summary(runs: Sequence[Run]) -> dict[str, float]:
    return {
        "edits": len(runs),
        "cpu_seconds": round(statistics.median(r.cpu_seconds for r in runs), 3),
        "peak_rss_mb": round(max(r.peak_rss for r in runs) / 2**20),
        **{c: round(statistics.fmean(r.quality[c] for r in runs), 3) for c in COLUMNS},
    }


def _table(report: dict[str, Any]) -> str:
    head = [
        "",
        "edits",
        "CPU s (median)",
        "peak MB",
        "reliability",
        "generality",
        "locality",
        "question",
        "p(target)",
    ]
    lines = [head] + [[name, *(f"{v:g}" for v in row.values())] for name, row in report["summary"].items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    body = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    where = f"{report['threads']} thread(s), {report['machine']}"
    title = f"ROME on {report['model']}, layer {report['layer']}, {where}"
    end = [f"times cheaper (CPU, same facts): {report['times_cheaper']}"] if report["times_cheaper"] else []
    return "\n".join([title, *body, *end])


if __name__ == "__main__":
    main()
