"""The in-the-wild table: an edit asked in every form, the subject's other facts, neighbours, ability, perplexity.

    python -m benchmarks.wild --methods auto rome memit in_context -n 30
    python -m benchmarks.wild --model MODEL.gguf --mode batch --methods memit -n 30 --runs 3
    python -m benchmarks.wild --methods auto -n 116 --shard 0/14 --out part0.json    # ... 13/14
    python -m benchmarks.wild --merge part*.json

`single` applies, measures and reverts one fact after another, `batch` applies all in one call, `sequence` one after
another on top of each other. A caller gives subject, prompt and target, nothing else. What is asked is worded in no
method's data (a test checks it); other facts and neighbours count where the model knew them before. A fact whose edit
is refused or rejected counts as it is then: not said. `CPU seconds` are those of apply_edits, its measuring included.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.wild.facts import load
from benchmarks.wild.run import Bench, Call, opened, units
from benchmarks.wild.table import table
from server.facts.guard import Guard


def main() -> None:
    options = read_options()
    if options.merge:
        parts = [json.loads(path.read_text("utf-8")) for path in options.merge]
        _show([r for part in parts for r in part["records"]], parts[0]["about"])
        return
    wild = load()
    work = units(options.methods, wild.facts, options.mode, options.runs, options.n, options.seed)
    index, count = options.shard
    mine = work[index::count]
    records: list[dict[str, Any]] = []
    with opened(options) as services:
        lm = services.workspace.lm
        about = (
            f"{lm.name}, {options.mode}, {len(work[0].facts) if options.mode != 'single' else options.n} facts, "
            f"{str(lm.dtype).removeprefix('torch.')} on {lm.device.type}, seed {options.seed}"
        )
        bench = Bench(services, wild, call_of(options))
        for i, unit in enumerate(mine, 1):
            records += bench.measure(unit)
            print(f"\r{i} of {len(mine)}: {unit.method}   ", end="", file=sys.stderr, flush=True)
            if options.out:
                text = json.dumps({"about": about, "records": records}, ensure_ascii=False, indent=1)
                options.out.write_text(text + "\n", "utf-8")
    print(file=sys.stderr)
    _show(records, about)


def call_of(options: argparse.Namespace) -> Call:
    """How apply_edits is called, by the command line."""
    given = {"params": options.params, "goal": options.goal, "guard": options.guard}
    return Call(options.mode, {name: value for name, value in given.items() if value is not None})


def _show(records: list[dict[str, Any]], about: str) -> None:
    print(table(records, about))
    refused = [r for r in records if r["status"] != "kept"]
    for record in refused[:20]:
        print(f"\nnot kept: {record['method']}, {record['subject']} -> {record['target']}: {record['why']}")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shard; write I/N with I from 0 to N-1, such as 0/14"
        )
    return int(index), int(count)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--models", type=Path, help="folder of converted models")
    parser.add_argument("--statistics", type=Path, help="folder of second moments, kept between runs")
    parser.add_argument("--methods", nargs="+", default=["auto"], help="methods to compare, auto among them")
    parser.add_argument("--mode", choices=("single", "batch", "sequence"), default="single")
    parser.add_argument("-n", type=int, default=30, help="facts, of a batch or in all (default 30)")
    parser.add_argument("--runs", type=int, default=1, help="batches or sequences of different facts")
    parser.add_argument("--seed", type=int, default=0, help="which facts are drawn")
    parser.add_argument("--params", type=json.loads, help="JSON of the methods' parameters")
    parser.add_argument("--goal", help="everywhere or export")
    parser.add_argument("--guard", type=Guard.model_validate_json, help="JSON of the bounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="I/N: the I-th of N parts, from 0")
    parser.add_argument("--out", type=Path, help="JSON file of the records")
    parser.add_argument("--merge", type=Path, nargs="+", help="print the table of such files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
