"""Facts of published files one after another on top of each other, asked at the end: what holds, and what it cost.

    python -m benchmarks.sequences --data counterfact.json --method constrained -n 1000 --at 100 300 1000 \\
        --wikitext wiki.valid.raw
    python -m benchmarks.sequences --data counterfact.json --method alphaedit -n 100

Every edit is computed on the edits before it with the material that apply_edits collects, and recorded as it is. What
apply_edits would ask before and after each is left out, so no edit is refused and none tried in another way: with
`constrained` these are the edits of method="auto" where its first way holds, without the other facts of the subjects,
which are asked to judge it. Only the first paraphrase of a fact is asked; no paraphrase is learned. At each of `--at`
facts: the share of statements, paraphrases and neighbours (those that the unedited model answered rightly) among
`--asked` of them, evenly from all, and perplexity.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import homes
from benchmarks.facts import read
from benchmarks.perplexity import perplexity_of
from editors.edit import Edit
from editors.measure import ask
from editors.scoring import answered_with
from server.facts.material import collect
from server.methods import checked_params, editor_named
from server.request_context import RequestContext
from server.services import Services
from server.transaction.transaction import Transaction
from store import Who, fact_key

WHO = Who("benchmark", "1", None, None)
TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="CounterFact, zsRE or KnowEdit files, one after another",
    )
    parser.add_argument("--method", default="constrained")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON of the method's parameters")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="facts left out before the first")
    parser.add_argument("--together", type=int, default=1, help="facts of one call (default 1)")
    parser.add_argument("--at", type=int, nargs="+", default=[], help="ask after so many, too: ends of calls")
    parser.add_argument("--asked", type=int, default=200, help="facts that are asked at most (default 200)")
    parser.add_argument("--wikitext", type=Path, help="a text file for perplexity")
    parser.add_argument("--characters", type=int, default=40_000, help="of that text (default 40,000)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument(
        "--keep", type=Path, help="folder of what is computed once for a model, for the next run"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    facts = distinct([edit for path in options.data for edit in read(path).edits])[
        options.skip : options.skip + options.n
    ]
    with opened(options) as services:
        for row in rows(services, facts, options):
            print(json.dumps(row), flush=True)


def distinct(edits: Sequence[Edit]) -> list[Edit]:
    """The edits, each question once."""
    return list({fact_key(edit.subject, edit.text): edit for edit in edits}.values())


def opened(options: argparse.Namespace) -> AbstractContextManager[Services]:
    """The services on a home of its own."""
    kept = {name: options.keep / name for name in ("statistics", "relations")} if options.keep else {}
    return homes.opened(kept=kept, model=options.model, models=options.models, threads=options.threads)


def rows(services: Services, facts: Sequence[Edit], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of figures after each of the wanted numbers of facts, the last after all."""
    lm = services.workspace.lm
    text = options.wikitext.read_text("utf-8")[: options.characters] if options.wikitext else ""
    base = perplexity_of(lm, text) if text else None
    calls = range(options.together, len(facts), options.together)
    places = sorted({*options.at} & {*calls} | {len(facts)})
    samples = {place: _sample(facts[:place], options.asked) for place in places}
    known = asked_of(services, distinct([fact for sample in samples.values() for fact in sample]))
    editor = editor_named(options.method)
    params = checked_params(editor, lm, options.params)
    services.workspace.prepare(editor, params, RequestContext())
    spent = 0.0
    for start in range(0, len(facts), options.together):
        call = facts[start : start + options.together]
        begun = time.process_time()
        apply(services, options.method, params, call)
        spent += time.process_time() - begun
        done = start + len(call)
        print(f"\r{done} of {len(facts)}", end="", file=sys.stderr, flush=True)
        if done in places:
            begun = time.process_time()
            sample = samples[done]
            row = rates(sample, asked_of(services, sample), known)
            row |= {"ask_cpu_s": round((time.process_time() - begun) / len(sample), 3)}
            if base is not None:
                row["perplexity"] = round(perplexity_of(lm, text) / base, 4)
            yield {"facts": done, "method": options.method, **row, "cpu_s_per_edit": round(spent / done, 3)}


def apply(services: Services, method: str, params: Any, facts: Sequence[Edit]) -> None:
    """The facts of one call on top of the others, with what a caller gives: subject, prompt and target."""
    workspace, editor = services.workspace, editor_named(method)
    edits = [Edit(subject=fact.subject, prompt=fact.prompt, target=fact.target) for fact in facts]
    with workspace.turn(RequestContext()):
        context = replace(
            workspace.edit_context(RequestContext()),
            materials=collect(workspace, edits, others=editor.holds_others),
        )
        patch = editor.compute(workspace.lm, edits, params, context)
        requests = [edit.model_dump(mode="json") | {"prompt": edit.text} for edit in edits]
        with Transaction(workspace) as tx:
            staged = tx.add(method, patch, len(edits))
            tx.commit_applied([tx.describe(staged, requests, params.model_dump(mode="json"))], WHO)


def asked_of(services: Services, facts: Sequence[Edit]) -> Mapping[str, str]:
    """What the model says to the prompts of facts, their first paraphrases and neighbours."""
    prompts = [p for f in facts for p in (f.text, *f.paraphrases[:1], *(n.prompt for n in f.neighbours[:1]))]
    with services.workspace.turn(RequestContext()):
        return ask(services.workspace.lm, prompts, TOKENS)


def rates(facts: Sequence[Edit], said: Mapping[str, str], before: Mapping[str, str]) -> dict[str, Any]:
    """Shares that are answered with the target; of neighbours, with the answer that the unedited model gave rightly."""
    found: dict[str, list[bool]] = {"statements": [], "paraphrases": [], "neighbours": []}
    for fact in facts:
        found["statements"].append(answered_with(fact.text, said[fact.text], fact.target))
        for prompt in fact.paraphrases[:1]:
            found["paraphrases"].append(answered_with(prompt, said[prompt], fact.target))
        for near in fact.neighbours[:1]:
            if near.answer and answered_with(near.prompt, before.get(near.prompt, ""), near.answer):
                found["neighbours"].append(answered_with(near.prompt, said[near.prompt], near.answer))
    shares = {name: round(statistics.fmean(held), 3) if held else None for name, held in found.items()}
    return shares | {"asked": len(facts), "neighbours_asked": len(found["neighbours"])}


def _sample(facts: Sequence[Edit], most: int) -> list[Edit]:
    """At most so many, evenly from all."""
    step = max(1.0, len(facts) / most)
    return [facts[int(i * step)] for i in range(min(most, len(facts)))]


if __name__ == "__main__":
    main()
