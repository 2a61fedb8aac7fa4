"""What `make bench` prints: the closed-form family beside the plain implementation of ROME's paper.

    python -m benchmarks [--quick] [--data counterfact.json] [--json FILE]

ROME one fact at a time, MEMIT in batches of 1, 10 and 100, AlphaEdit one after another: CPU
seconds per edit, peak memory and quality, all in one process, the plain implementation interleaved
(it takes a minute or more an edit, so it does only a few). Our own facts are 60, and facts that the
server ships fill the batch of 100, without neighbours; --data names a published file instead. The
second table shows how the cost of one edit grows with the model's size, by random models of the
same shape, narrower and wider.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import load, read
from benchmarks.growth import growth, growth_table
from benchmarks.plain_rome import PlainParams, PlainRome
from benchmarks.rome import _model as load_model
from benchmarks.rome import _peak_rss, _reset_peak
from editors import METHODS
from editors.edit import Edit
from editors.learned.record_files import SHIPPED, read_records
from editors.measure import observe
from editors.method import EditContext, Prior
from editors.model.lm import LM
from editors.moments import Statistics
from editors.outcomes import Outcome, ProbeKind, outcomes
from editors.patch import Patch, join_deltas

SIZES = (1, 10, 100)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lm, home = load_model(options)
    bench = Bench(lm, Statistics(home / "statistics", "bench-" + "".join(filter(str.isalnum, lm.name))))
    edits = list(read(options.data).edits) if options.data else _own(max(SIZES))
    edits = [e.model_copy(update={"neighbours": e.neighbours[:5]}) for e in edits]
    few = 2 if options.quick else 5
    rows = bench.singles(edits[:few], plain=1 if options.quick else 3)
    for size in SIZES[:2] if options.quick else SIZES:
        rows.append(bench.batch("memit", edits[: min(size, len(edits))]))
    rows.append(bench.sequence("alphaedit", edits[: 3 if options.quick else 30]))
    title = f"{lm.name}, {lm.parameters / 1e6:.0f}M parameters, {options.threads} thread(s)"
    print("\n".join([title, f"second moments: {bench.statistics_seconds:.1f} CPU s", _table(rows)]))
    sizes = growth(lm, edits, plain=not options.quick)
    print(growth_table(sizes))
    if options.json:
        options.json.write_text(
            json.dumps({"model": title, "rows": rows, "sizes": sizes}, indent=2) + "\n", "utf-8"
        )


def _own(n: int) -> list[Edit]:
    """Our 60 facts, then shipped ones whose subjects are neither theirs nor their neighbours'."""
    edits = [f.edit for f in (*load("check"), *load("tune"))]
    said = " ".join(text for e in edits for text in (e.prompt, *(near.prompt for near in e.neighbours)))
    shipped = read_records(SHIPPED)
    for record in random.Random(0).sample(shipped, len(shipped)):
        if len(edits) < n and record.subject in record.prompt and record.subject not in said:
            said += f" {record.subject}"
            edits.append(
                Edit(
                    prompt=record.prompt,
                    subject=record.subject,
                    target=record.target,
                    paraphrases=list(record.paraphrases),
                )
            )
    return edits


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few facts of each: some minutes")
    parser.add_argument("--data", type=Path, help="a published file instead of our own facts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--home", type=Path, default=None, help="where model and statistics are kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


class Bench:
    """One loaded model and its second moments, made for all layers that a default needs in one pass."""

    def __init__(self, lm: LM, moments: Statistics) -> None:
        self.lm, self.moments = lm, moments
        needed = {
            i
            for name in ("rome", "memit", "alphaedit")
            for i in METHODS[name].layers_needed(lm, METHODS[name].params())
        }
        start = time.process_time()
        moments.ensure(lm, sorted(needed), lambda *_: None)
        self.statistics_seconds = time.process_time() - start

    def compute(self, method: str, edits: Sequence[Edit], prior: Sequence[Patch] = ()) -> Patch:
        editor = METHODS[method]
        known = [Prior(method, p, (0,)) for p in prior]
        return editor.compute(
            self.lm, edits, editor.resolve(self.lm, editor.params()), EditContext(self.moments, known)
        )

    def singles(self, edits: Sequence[Edit], plain: int) -> list[dict[str, Any]]:
        """ROME on each fact alone, and the plain one on the first few, in turn."""
        layer = METHODS["rome"].resolve(self.lm, METHODS["rome"].params()).layer
        baseline = PlainRome(self.lm, self.moments.get(layer).matrix, PlainParams(layer=layer))
        runs: dict[str, list[dict[str, Any]]] = {"rome, one fact": [], "plain rome, one fact": []}
        for i, edit in enumerate(edits):
            runs["rome, one fact"].append(self._timed([edit], lambda e=edit: [self.compute("rome", [e])]))
            if i < plain:
                runs["plain rome, one fact"].append(self._timed([edit], lambda e=edit: [baseline.compute(e)]))
        return [_mean(name, made) for name, made in runs.items()]

    def batch(self, method: str, edits: Sequence[Edit]) -> dict[str, Any]:
        return {"name": f"{method}, batch of {len(edits)}"} | self._timed(
            edits, lambda: [self.compute(method, edits)]
        )

    def sequence(self, method: str, edits: Sequence[Edit]) -> dict[str, Any]:
        """One after another, each on top of those before; measured at the end."""

        def run() -> list[Patch]:
            done: list[Patch] = []
            for edit in edits:
                with self.lm.patched(join_deltas(done)):
                    done.append(self.compute(method, [edit], done))
            return done

        return {"name": f"{method}, {len(edits)} in sequence"} | self._timed(edits, run)

    def _timed(self, edits: Sequence[Edit], make: Any) -> dict[str, Any]:
        """CPU seconds an edit and peak memory of making the patches, then their quality."""
        before = observe(self.lm, edits)
        _reset_peak()
        start = time.process_time()
        patches = make()
        seconds, peak = time.process_time() - start, _peak_rss()
        with self.lm.patched(join_deltas(patches)):
            found = outcomes(edits, before, observe(self.lm, edits))
        return {
            "edits": len(edits),
            "cpu_seconds": seconds / len(edits),
            "peak_mb": peak / 2**20,
            "reliability": statistics.fmean(o.reliability for o in found),
            "generality": _rate(found, "paraphrase"),
            "locality": _rate(found, "neighbour"),
        }


def _rate(found: Sequence[Outcome], kind: ProbeKind) -> float:
    """The mean over the edits that have probes of a kind."""
    return statistics.fmean(rate for o in found if (rate := o.rate(kind)) is not None)


def _mean(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, **{k: statistics.fmean(r[k] for r in runs) for k in runs[0]}}
    return row | {"edits": len(runs), "peak_mb": max(r["peak_mb"] for r in runs)}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["", "edits", "CPU s/edit", "peak MB", "reliability", "generality", "locality"]
    lines = [head]
    for row in rows:
        rates = [f"{row[k]:.3f}" for k in ("reliability", "generality", "locality")]
        lines.append(
            [row["name"], str(row["edits"]), f"{row['cpu_seconds']:.2f}", f"{row['peak_mb']:.0f}", *rates]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
