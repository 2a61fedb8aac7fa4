"""The papers' metrics for a method on a published set: CounterFact, zsRE or KnowEdit.

    python -m benchmarks.quality --data counterfact.json --method memit --n 100 --out results/memit
    python -m benchmarks.quality --data counterfact.json --method alphaedit --n 200 --mode sequence \\
        --wikitext wiki.valid.raw --out results/alphaedit

`batch` makes one patch of all facts, `sequence` one after another on top of each other, measured
at the end. Patches are kept under --out, so a run that was cut off goes on where it stopped.

efficacy, paraphrase, neighbourhood
    share of prompts where the wanted answer is more probable than the other one (ROME, sec. 3.2):
    the new one over the one before, and for neighbours the reverse; `..._magnitude` is the difference.
reliability, generality, locality, portability
    by greedy generation with a natural end, as users see it.
question
    the prompt behind "<prompt> what?" in the chat template: the target anywhere in the answer.
fluency
    weighted entropy of bigrams and trigrams of 40 generated tokens, in bits.
perplexity
    on --wikitext, before and after.

Means are over facts, with 95% confidence intervals by bootstrap; beside them what the unedited model has,
which for a neighbourhood is about the most that an edit can keep.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import read
from benchmarks.perplexity import perplexity_of
from benchmarks.rome import _model as load_model
from benchmarks.rome import _peak_rss, _reset_peak
from editors import METHODS
from editors.edit import Edit
from editors.measure import Observation, ask, observe
from editors.method import EditContext, Prior
from editors.moments import Statistics
from editors.outcomes import outcomes
from editors.patch import Patch, join_deltas, save
from editors.patch_kinds import load
from editors.scoring import says

Values = dict[str, float]
METRICS = (
    "efficacy", "efficacy_magnitude", "paraphrase", "paraphrase_magnitude", "neighbourhood",
    "neighbourhood_magnitude", "reliability", "generality", "locality", "portability", "question", "fluency",
)  # fmt: skip


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    published = read(options.data)
    edits = list(published.edits)[options.skip : options.skip + options.n]
    if not edits:
        raise SystemExit(
            f"{options.data} has {len(published.edits)} usable records; --skip {options.skip} leaves none"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    lm, home = load_model(options)
    run = Run(lm, home, options)
    before = run.kept("before.json", lambda: run.asked(edits, "before"))
    text = options.wikitext.read_text("utf-8") if options.wikitext else ""
    perplexity = run.kept("perplexity.json", lambda: perplexity_of(lm, text)) if text else None
    patches = list(run.patches(edits))
    with lm.patched(join_deltas(patches)):
        after = run.asked(edits, "after")
        perplexity_after = perplexity_of(lm, text) if text else None
    report = {
        "data": options.data.name, "method": options.method, "mode": options.mode, "params": run.params.model_dump(),
        "model": lm.name, "facts": len(edits), "skipped": published.skipped,
        "summary": summary(scores(edits, before, after)), "unedited": summary(scores(edits, before, before)),
        "perplexity": {"before": perplexity, "after": perplexity_after} if text else None,
        "cpu_seconds_per_edit": run.cpu_per_edit(len(edits)), "peak_rss_mb": round(_peak_rss() / 2**20),
        "norm_growth": run.norm_growth(patches),
    }  # fmt: skip
    (options.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(table(report))
    if not options.no_plot:
        plot(report, options.out / "report.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a CounterFact, zsRE or KnowEdit file")
    parser.add_argument("--method", choices=sorted(METHODS), default="memit")
    parser.add_argument("--n", type=int, default=100, help="facts (default 100)")
    parser.add_argument("--skip", type=int, default=0, help="facts of the file to leave out first")
    parser.add_argument("--mode", choices=("batch", "sequence"), default="batch")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of the method's parameters")
    parser.add_argument("--neighbours", type=int, default=5, help="neighbours asked per fact (default 5)")
    parser.add_argument("--wikitext", type=Path, help="a text file for perplexity")
    parser.add_argument("--out", type=Path, required=True, help="folder of patches, report and plot")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--home", type=Path, default=None, help="where model and statistics are kept")
    parser.add_argument("--no-plot", action="store_true")
    return parser.parse_args()


class Run:
    """One method on one loaded model; what was computed is read from `--out` again."""

    def __init__(self, lm: Any, home: Path, options: argparse.Namespace) -> None:
        self.lm, self.options, self.out = lm, options, options.out
        self.editor = METHODS[options.method]
        self.params = self.editor.resolve(lm, self.editor.params(**options.params))
        self.statistics = Statistics(home / "statistics", "quality-" + "".join(filter(str.isalnum, lm.name)))
        self.editor.ensure_statistics(lm, self.params, self.statistics)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What a file under `--out` says, made first where there is none."""
        path = self.out / name
        if not path.exists():
            path.write_text(json.dumps(make(), ensure_ascii=False), "utf-8")
        return json.loads(path.read_text("utf-8"))

    def patches(self, edits: Sequence[Edit]) -> Iterator[Patch]:
        """One patch for a batch, one per fact for a sequence, each computed with those before it applied."""
        groups = [list(edits)] if self.options.mode == "batch" else [[e] for e in edits]
        done: list[Patch] = []
        for i, group in enumerate(groups):
            path = self.out / f"patch-{i}.safetensors"
            if not path.exists():
                prior = [Prior(self.options.method, p, (0,)) for p in done]
                context = EditContext(self.statistics, prior, progress(f"edit {i + 1}/{len(groups)}"))
                _reset_peak()
                start = time.process_time()
                with self.lm.patched(join_deltas(done)):
                    patch = self.editor.compute(self.lm, group, self.params, context)
                path.write_bytes(save(patch))
                (self.out / f"cpu-{i}.json").write_text(json.dumps(time.process_time() - start))
            done.append(load(path.read_bytes()))
            yield done[-1]

    def cpu_per_edit(self, n: int) -> float:
        total = sum(json.loads(p.read_text()) for p in self.out.glob("cpu-*.json"))
        return round(total / max(1, n), 3)

    def norm_growth(self, patches: Sequence[Patch]) -> dict[str, float]:
        """|W + all deltas| / |W| of every edited weight: what anchoring keeps at one."""
        grown = {}
        for name, deltas in join_deltas(patches).items():
            weight = self.lm.weight(name).float()
            grown[name] = round(float((weight + sum(d.dense() for d in deltas)).norm() / weight.norm()), 4)
        return grown

    def asked(self, edits: Sequence[Edit], moment: str) -> list[dict[str, Any]]:
        """What the model says now about each fact: log-probabilities and answers, as JSON."""
        found = []
        for i, edit in enumerate(edits):
            progress(f"asking {moment}")(i / len(edits), edit.subject)
            found.append(
                self._one(edit.model_copy(update={"neighbours": edit.neighbours[: self.options.neighbours]}))
            )
        progress(f"asking {moment}")(1.0, "done\n")
        return found

    def _one(self, edit: Edit) -> dict[str, Any]:
        lm = self.lm
        seen = observe(lm, [edit], fluency=True)
        question = f"{edit.text} what?"
        prompts = [edit.text, *edit.paraphrases, *(n.prompt for n in edit.neighbours)]
        pairs = [(lm.prompt(p), a) for p in prompts for a in (edit.target, edit.previous or edit.target)]
        per_token = [s.logprob / s.tokens for s in lm.score(pairs)]
        return {
            "answers": dict(seen.answers), "p_target": seen.p_target[0], "fluency": seen.fluency[0],
            "question": ask(lm, [question], 24)[question],
            "probabilities": [[math.exp(a), math.exp(b)] for a, b in zip(per_token[::2], per_token[1::2], strict=True)],
        }  # fmt: skip


def scores(edits: Sequence[Edit], before: Sequence[Any], after: Sequence[Any]) -> list[Values]:
    """Every metric of every fact that its record has data for."""
    found = []
    for edit, was, now in zip(edits, before, after, strict=True):
        edit = edit.model_copy(
            update={"neighbours": tuple(n for n in edit.neighbours if n.prompt in now["answers"])}
        )
        seen = [Observation(s["answers"], (s["p_target"],), (s["fluency"],)) for s in (was, now)]
        outcome = outcomes([edit], *seen)[0]
        values: Values = {"reliability": outcome.reliability, "fluency": now["fluency"]}
        values["question"] = float(
            says(now["question"], edit.target, anywhere=True, question=f"{edit.text} what?")
        )
        for metric, kind in (
            ("generality", "paraphrase"),
            ("locality", "neighbour"),
            ("portability", "portability"),
        ):
            if (rate := outcome.rate(kind)) is not None:  # type: ignore[arg-type]
                values[metric] = rate
        if edit.previous:
            values |= _by_probability(edit, now["probabilities"])
        found.append(values)
    return found


def _by_probability(edit: Edit, pairs: Sequence[Sequence[float]]) -> Values:
    first = 1 + len(edit.paraphrases)
    parts = {"efficacy": pairs[:1], "paraphrase": pairs[1:first], "neighbourhood": pairs[first:]}
    values: Values = {}
    for name, part in parts.items():
        gains = [(b - a) if name == "neighbourhood" else (a - b) for a, b in part]
        if gains:
            values[name] = statistics.fmean(g > 0 for g in gains)
            values[f"{name}_magnitude"] = statistics.fmean(gains)
    return values


def summary(found: Sequence[Values]) -> dict[str, dict[str, float]]:
    """Mean and 95% interval of every metric."""
    table: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        values = [v[metric] for v in found if metric in v]
        if values:
            low, high = interval(values)
            table[metric] = {
                "mean": round(statistics.fmean(values), 4),
                "low": low,
                "high": high,
                "n": len(values),
            }
    return table


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(rounds))
    return round(means[int(0.025 * rounds)], 4), round(means[int(0.975 * rounds) - 1], 4)


def progress(what: str) -> Callable[[float, str], None]:
    """A bar on standard error."""

    def show(fraction: float, message: str) -> None:
        bar = "#" * round(24 * fraction)
        print(
            f"\r{what:<16.16} [{bar:<24}] {fraction:4.0%} {message[:40]:<40}",
            end="",
            file=sys.stderr,
            flush=True,
        )

    return show


def table(report: dict[str, Any]) -> str:
    rows = [
        f"{k:<24}{v['mean']:>8.3f}  [{v['low']:.3f}, {v['high']:.3f}]  n={v['n']:<5} "
        f"unedited {report['unedited'][k]['mean']:.3f}"
        for k, v in report["summary"].items()
    ]
    head = f"{report['method']} on {report['facts']} facts of {report['data']} ({report['mode']}), {report['model']}"
    tail = [f"CPU s per edit {report['cpu_seconds_per_edit']}, peak {report['peak_rss_mb']} MB"]
    if report["perplexity"]:
        tail.append(f"perplexity {report['perplexity']['before']} -> {report['perplexity']['after']}")
    return "\n".join([head, *rows, *tail])


def plot(report: dict[str, Any], path: Path) -> None:
    """The rates with their intervals, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = {k: v for k, v in report["summary"].items() if not k.endswith("_magnitude") and k != "fluency"}
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(rates) + 1.2), layout="constrained")
    names, means = list(rates), [v["mean"] for v in rates.values()]
    spread = [
        [m - v["low"] for m, v in zip(means, rates.values(), strict=True)],
        [v["high"] - m for m, v in zip(means, rates.values(), strict=True)],
    ]
    axes.barh(names, means, xerr=spread, color="#4878a8", height=0.6)
    axes.set(xlim=(0, 1.02), title=f"{report['method']}, {report['facts']} facts ({report['mode']})")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
