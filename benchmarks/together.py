"""Facts in one batch or one after another, through the services: how they hold in every form, what it
costs, and how fast one of them is reverted.

    python -m benchmarks.together [--facts check] [--method memit] [--n 30] [--wikitext wiki.valid.raw]
    python -m benchmarks.together --sequence --method alphaedit
    python -m benchmarks.together --sequence --method wise --published counterfact.json --skip 197 --n 100

Success is greedy generation with a natural end, asked as the edit's own prompt and as its paraphrases; as a
plain question ("Question: ...? Answer:") and a question in the chat template, the target anywhere in the
answer's beginning. The revert's time is wall
clock, with the ledger's row and the weights' hash; after all are reverted the hash must be the base's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import homes
from benchmarks.facts import Fact, load, read
from benchmarks.perplexity import perplexity_of
from editors import METHODS
from editors.edit import Edit
from editors.measure import ask, observe
from editors.model.lm import LM
from editors.outcomes import outcomes
from editors.scoring import says
from server.request_context import RequestContext
from server.services import Services

REVERTED = 5  # single facts taken back and timed
TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", choices=("tune", "check"), default="check")
    parser.add_argument("--method", choices=[*sorted(METHODS), "auto"], default="memit")
    parser.add_argument("--published", type=Path, help="facts of a published file, with one paraphrase each")
    parser.add_argument("--skip", type=int, default=0, help="facts left out before the first")
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--sequence", action="store_true", help="one after another instead of one batch")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of the method's parameters")
    parser.add_argument("--wikitext", type=Path, help="text for the perplexity")
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args()
    chosen = {
        "model": options.model,
        "models": options.models,
        "device": options.device,
        "dtype": options.dtype,
    }
    with homes.opened(kept={}, threads=1, **chosen) as services:
        facts = _published(options.published) if options.published else load(options.facts)
        facts = facts[options.skip : options.skip + options.n]
        print(json.dumps(run(services, facts, options), indent=2))


def _published(path: Path) -> list[Fact]:
    kept = {"neighbours": (), "portability": ()}
    edits = [e.model_copy(update=kept | {"paraphrases": e.paraphrases[:1]}) for e in read(path).edits]
    return [Fact("", e, f"{e.text} what?") for e in edits]


def run(services: Services, facts: Sequence[Fact], options: argparse.Namespace) -> dict[str, Any]:
    lm = services.workspace.lm
    edits = [f.edit for f in facts]
    before = observe(lm, edits)
    text = options.wikitext.read_text("utf-8") if options.wikitext else ""
    base = perplexity_of(lm, text) if text else None
    for name in ("rome", "alphaedit", "wise") if options.method == "auto" else (options.method,):
        services.workspace.prepare(
            METHODS[name], METHODS[name].params(**options.params), RequestContext()
        )  # as a warm server
    bare = [Edit(subject=e.subject, prompt=e.prompt, target=e.target) for e in edits]
    calls = [[e] for e in bare] if options.sequence else [bare]
    ids, start, begun = [], time.process_time(), time.perf_counter()
    for group in calls:
        ids += services.edits.apply(group, options.method, options.params).edit_ids
        print(f"\r{len(ids)} of {len(edits)}", end="", file=sys.stderr, flush=True)
    spent, waited = time.process_time() - start, time.perf_counter() - begun
    found = outcomes(edits, before, observe(lm, edits))
    report = {
        "method": options.method,
        "facts": len(edits),
        "in": "sequence" if options.sequence else "one batch",
        "reliability": statistics.fmean(o.reliability for o in found),
        "generality": _mean(o.rate("paraphrase") for o in found),
        "locality": _mean(o.rate("neighbour") for o in found),
        **_questions(lm, facts),
        "cpu_seconds_a_fact": spent / len(edits),
        "seconds_a_fact": waited / len(edits),
    }
    if base is not None:
        report["perplexity_ratio"] = perplexity_of(lm, text) / base
    report |= _reverted(services, ids)
    report["back_at_base"] = services.workspace.host.weights_hash == services.workspace.host.base_hash
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}


def _reverted(services: Services, ids: Sequence[str]) -> dict[str, float]:
    """Take some edits back one by one, timed, then the rest."""
    times, taken = [], ids[:: max(1, len(ids) // REVERTED)]
    for i in taken:
        start, busy = time.perf_counter(), time.process_time()
        services.edits.revert([i])
        times.append((time.perf_counter() - start, time.process_time() - busy))
    if left := [i for i in ids if i not in taken]:
        services.edits.revert(left)
    names = ("revert_one_seconds", "revert_one_cpu_seconds")
    return {name: statistics.median(t[k] for t in times) for k, name in enumerate(names)}


def _mean(values: Any) -> float | None:
    kept = [v for v in values if v is not None]
    return statistics.fmean(kept) if kept else None


def _questions(lm: LM, facts: Sequence[Fact]) -> Mapping[str, float]:
    """The facts as questions, without and with the chat template."""
    plain = {f"Question: {f.question} Answer:": f.edit.target for f in facts}
    chat = {f.question: f.edit.target for f in facts}
    rates = {}
    for name, wanted in (("question", plain), ("chat_question", chat)):
        said = ask(lm, list(wanted), TOKENS)
        rates[name] = statistics.fmean(says(said[p], t, anywhere=True, question=p) for p, t in wanted.items())
    return rates


if __name__ == "__main__":
    main()
