"""What a constant does: the same edits with several values of it, on one model.

    python -m benchmarks.constants editors.closed_form.write_one.SLACK --values .003 .03 .3
    python -m benchmarks.constants editors.closed_form.values.ValueParams.lr --values 1 3 6 --model MODEL.gguf
    python -m benchmarks.constants editors.closed_form.weighted.MemitParams.weight --values .1 .2 .4 --together

The name is one of docs/constants.md; the value that stands in the code is always measured too. The facts are those of
tune.json, never those of check.json or wild.json, so that these can still judge. Each fact is edited by itself, or all
in one call with `--together`. `others` are other facts of the subject that the model knew before; `perplexity` is
after / before on short everyday texts; `CPU s` is the median of computing the edit, without the measuring. A value
that gives the same patches as the first one, bit for bit, is marked: the constant does nothing here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from benchmarks.facts import Fact, load
from editors import METHODS, applied
from editors.canaries import Canaries
from editors.edit import Edit, Probe
from editors.forms.form import Material
from editors.forms.material import materials_for
from editors.measure import observe
from editors.method import EditContext
from editors.moments import Statistics
from editors.outcomes import outcomes
from editors.patch import save
from server.models.loading import load as load_model
from server.settings import Settings

COLUMNS = ("said", "reworded", "chat", "neighbours", "others", "perplexity", "worst", "CPU s")
NOT_TOGETHER = ("reworded", "chat", "neighbours", "others")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    place, default = found(options.constant)
    print(f"{options.constant} on {bench.lm.name}: {bench.about}, today {default!r}", flush=True)
    print("value".rjust(12), *(c.rjust(10) for c in COLUMNS), flush=True)
    values = list(dict.fromkeys(map(_hashable, [default, *options.values])))
    hashes: list[str] = []
    for value in values:
        with changed(place, value, bench.editor.params) as params:
            row, hashed = bench.measure({**options.params, **params})
        same = "  the same patches" if hashed in hashes else ""
        hashes.append(hashed)
        print(str(value).rjust(12), *(_cell(row[c]).rjust(10) for c in COLUMNS), same, flush=True)


class Bench:
    """The loaded model, its facts, and what it says before any edit."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.editor, self.together = METHODS[options.method], options.together
        home = options.home or Path(tempfile.gettempdir()) / "errata-constants"
        chosen = {"home": home, "model": options.model, "models": options.models, "threads": options.threads}
        self.lm = load_model(Settings(**chosen), lambda *_: None)
        facts = load("tune")
        self.edits = [_asked(f) for f in facts[:: max(1, len(facts) // options.n)][: options.n]]
        self.bare = [Edit(subject=e.subject, prompt=e.prompt, target=e.target) for e in self.edits]
        self.own = materials_for(self.lm, self.bare)
        # other facts of a subject are all measured and none is learned from
        self.materials = [Material(siblings=(*m.held, *m.siblings)) for m in self.own]
        self.before = observe(self.lm, self.edits, materials=self.materials, forms=False)
        self.canaries = Canaries(self.lm)
        self.statistics = Statistics(home / "statistics", f"constants-{self.lm.name}")
        how = "in one call" if self.together else "one at a time"
        self.about = f"{options.method}, {len(self.edits)} facts of tune.json {how}"

    def measure(self, params: Mapping[str, Any]) -> tuple[dict[str, float | None], str]:
        """Every rate with these parameters, what an edit costs, and a hash of the patches."""
        resolved = self.editor.resolve(self.lm, self.editor.params(**params))
        self.editor.ensure_statistics(self.lm, resolved, self.statistics)
        calls = [list(range(len(self.edits)))] if self.together else [[i] for i in range(len(self.edits))]
        self.hash = hashlib.sha256()
        rows = [row for call in calls for row in self._edited(call, resolved)]
        found = {c: [r[c] for r in rows if r[c] is not None] for c in COLUMNS if c in rows[0]}
        means = {c: statistics.fmean(v) if v else None for c, v in found.items()}
        costs = {"worst": max(found["perplexity"]), "CPU s": statistics.median(found["CPU s"])}
        return means | costs, self.hash.hexdigest()

    def _edited(self, call: Sequence[int], params: Any) -> Iterator[dict[str, Any]]:
        """The rates of each edit of one call, measured while all of the call act."""
        given = [self.bare[i] for i in call]
        start = time.process_time()
        context = EditContext(self.statistics, materials=[self.own[i] for i in call])
        patch = self.editor.compute(self.lm, given, params, context)
        seconds = (time.process_time() - start) / len(call)
        self.hash.update(save(patch))
        edits, materials = [self.edits[i] for i in call], [self.materials[i] for i in call]
        with applied(self.lm, patch):
            after = observe(self.lm, edits, materials=materials, forms=False)
            drift = self.canaries.drift(self.lm)
        # the observation before is of all edits; only its answers by prompt are compared
        for outcome in outcomes(edits, self.before, after, materials=materials):
            yield {
                "said": outcome.reliability,
                "reworded": outcome.rate("paraphrase"),
                "chat": outcome.rate("portability"),
                "neighbours": outcome.rate("neighbour"),
                "others": outcome.rate("sibling"),
                "perplexity": drift.perplexity_after / drift.perplexity_before,
                "CPU s": seconds,
            }


def _asked(fact: Fact) -> Edit:
    """The edit with everything that it is asked, its fact as a chat question among them."""
    question = Probe(prompt=fact.question, answer=fact.edit.target)
    return fact.edit.model_copy(update={"portability": (question,)})


def found(name: str) -> tuple[tuple[Any, str], Any]:
    """Where a constant stands, (module or parameter class, its name there), and its value."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            holder: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:-1]:
                holder = getattr(holder, part)
            fields = getattr(holder, "model_fields", {})
            value = fields[parts[-1]].default if parts[-1] in fields else getattr(holder, parts[-1])
        except AttributeError:
            break
        return (holder, parts[-1]), value
    sys.exit(f"no constant is called {name!r}; docs/constants.md lists them all")


@contextmanager
def changed(
    place: tuple[Any, str], value: Any, parameters: type[BaseModel] | None = None
) -> Iterator[dict[str, Any]]:
    """Run with another value of a constant, put into every module that has it.

    Yields the parameters that carry it: the constant may be a field of `parameters`, or its default.
    """
    holder, name = place
    if hasattr(holder, "model_fields"):
        yield {name: value}
        return
    was = getattr(holder, name)
    mine = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] in ("editors", "server")]
    using = [holder, *(m for m in mine if m is not holder and getattr(m, name, None) is was)]
    fields = parameters.model_fields if parameters else {}
    for each in using:
        setattr(each, name, value)
    try:
        yield {key: value for key, field in fields.items() if field.default is was}
    finally:
        for each in using:
            setattr(each, name, was)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("constant", help="its full name, as in docs/constants.md")
    parser.add_argument(
        "--values", nargs="+", type=json.loads, default=[], help="other values to try, as JSON"
    )
    parser.add_argument("--method", choices=sorted(METHODS), default="rome")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of the method's other parameters")
    parser.add_argument("-n", type=int, default=10, help="facts, spread over the file (default 10)")
    parser.add_argument("--together", action="store_true", help="all facts in one call")
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--models", type=Path, help="folder of converted models")
    parser.add_argument("--home", type=Path, help="where second moments are kept")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
