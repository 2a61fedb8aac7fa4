"""MEND and SERAC on facts they were not trained on: training, quality, seconds an edit, seconds a question.

    python -m benchmarks.learned mend [--facts check] [--n 30] [--params JSON] [--data facts]
    python -m benchmarks.learned serac --crowd 1000

Trains first (the shipped facts hold none of the benchmark's) unless --trained names a folder with a
finished training. Quality is greedy generation, every edit by itself on the pristine model. `--data`
and `--published FILE` take published sets for training and evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.facts import load, read
from editors.learned.trained_folder import TrainedFolder


def main() -> None:
    options = _options()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import torch

    torch.set_num_threads(options.threads)
    from server.models.loading import load as load_model
    from server.settings import Settings

    chosen = {"home": options.home} if options.home else {}
    lm = load_model(
        Settings(device=options.device, dtype=options.dtype, threads=options.threads, **chosen),
        lambda *_: None,
    )
    folder = options.trained or Path(tempfile.mkdtemp(prefix="errata-learned-"))
    report: dict[str, Any] = {"method": options.method, "facts": options.facts, "folder": str(folder)}
    if options.trained is None:
        report["training"] = train(lm, options, folder)
    lm.extension(TrainedFolder).path = folder
    edits = (
        [f.edit for f in load(options.facts)]
        if not options.published
        else list(read(options.published).edits)
    )
    report["edits"] = evaluate(lm, options.method, edits[: options.n], folder)
    if options.method == "serac":
        report["latency"] = latency(lm, edits[: options.n], folder, options.crowd)
    print(json.dumps(report, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=("mend", "serac"))
    parser.add_argument("--facts", choices=("tune", "check"), default="check")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--data", default="facts", help="training data (default: the shipped facts)")
    parser.add_argument("--published", type=Path, help="evaluate on a published file instead")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of the training's parameters")
    parser.add_argument("--trained", type=Path, help="folder of a finished training")
    parser.add_argument("--crowd", type=int, default=1000, help="entries beside the edits, for latency")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Alone:
    """A training's monitor on the command line."""

    model_hash = "benchmark"

    def __init__(self, lm: Any, folder: Path) -> None:
        self.lm, self.folder = lm, folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def turn(self) -> Iterator[Any]:
        yield self.lm

    def report(self, fraction: float, message: str) -> None:
        """Say on stderr what goes on."""
        print(f"\r{fraction:4.0%} {message}   ", end="", file=sys.stderr, flush=True)

    def metric(self, values: Mapping[str, float]) -> None:
        print({k: round(v, 3) for k, v in values.items()}, file=sys.stderr, flush=True)


def train(lm: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training; its own report, validation included."""
    from editors.learned import mend_params, mend_training, serac_params, serac_training
    from editors.learned.mend import FILE
    from editors.learned.record_files import read_records

    data = read_records(options.data)
    monitor = Alone(lm, folder / "job")
    if options.method == "mend":
        mend = mend_params.MendTraining(**options.params)
        return mend_training.MendTrainer(data, mend, monitor).run(folder / FILE)
    serac = serac_params.SeracTraining(**options.params)
    return serac_training.SeracTrainer(data, serac, monitor).run(folder)


def evaluate(lm: Any, method: str, edits: Sequence[Any], folder: Path) -> dict[str, Any]:
    """Every edit by itself: rates, and CPU seconds (and by the clock, for a GPU) to compute it."""
    from editors import METHODS
    from editors.measure import observe
    from editors.method import EditContext
    from editors.moments import Statistics
    from editors.outcomes import outcomes
    from server.transaction.host import ActivePatch, ModelHost

    editor, host = METHODS[method], ModelHost(lm)
    context = EditContext(Statistics(folder, "none"), trained=folder)
    seconds, waited, found = [], [], []
    for edit in edits:
        before = observe(lm, [edit])
        start, begun = time.process_time(), time.perf_counter()
        patch = editor.compute(lm, [edit], editor.params(), context)
        seconds.append(time.process_time() - start)
        waited.append(time.perf_counter() - begun)
        host.set_stack([ActivePatch(1, 1, method, patch, (0,), "1")])
        found.append(outcomes([edit], before, observe(lm, [edit]))[0])
        host.set_stack([])
        print(f"{edit.subject}: {found[-1].after!r}", file=sys.stderr, flush=True)
    rates = {"reliability": [o.reliability for o in found]}
    for name, kind in (
        ("generality", "paraphrase"),
        ("locality", "neighbour"),
        ("portability", "portability"),
    ):
        rates[name] = [r for o in found if (r := o.rate(kind)) is not None]  # type: ignore[arg-type]
    return {
        "n": len(found),
        **{k: round(statistics.fmean(v), 3) for k, v in rates.items() if v},
        "cpu_seconds_an_edit": round(statistics.median(seconds), 3),
        "seconds_an_edit": round(statistics.median(waited), 3),
    }


def latency(lm: Any, edits: Sequence[Any], folder: Path, crowd: int) -> dict[str, float]:
    """Median CPU seconds of a question of 24 tokens, without a memory and with one of `crowd` entries."""
    from editors import METHODS
    from editors.edit import Edit
    from editors.method import EditContext
    from editors.moments import Statistics

    editor = METHODS["serac"]
    others = [Edit(subject=f"Place {i}", prompt="The capital of {} is", target="Rome") for i in range(crowd)]
    patch = editor.compute(
        lm, [*edits, *others], editor.params(), EditContext(Statistics(folder, "none"), trained=folder)
    )
    inside = [lm.prompt(e.text) for e in edits[:8]]
    outside = [lm.prompt(n.prompt) for e in edits[:8] for n in e.neighbours[:1]]
    found = {"plain": _median(lm, inside)}
    detach = patch.attach(lm)
    try:
        lm.generate(inside[:1], 2)
        found["in_scope"], found["out_of_scope"] = _median(lm, inside), _median(lm, outside)
    finally:
        detach()
    return {k: round(v, 4) for k, v in found.items()}


def _median(lm: Any, prompts: Sequence[Any]) -> float:
    times = []
    for prompt in prompts:
        start = time.process_time()
        lm.generate([prompt], 24)
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
