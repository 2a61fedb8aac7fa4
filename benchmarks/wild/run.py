"""Apply edits as the tools do, one at a time, in one call or one after another, and measure them from outside."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks import homes
from benchmarks.wild.asking import Answers, ask, described, known_before, perplexity, rates, share
from benchmarks.wild.facts import Asked, Wild, WildFact, drawn
from editors.edit import Edit
from editors.errors import EditError
from server.errors import ServiceError
from server.services import Services

Record = dict[str, Any]
WARM = Edit(subject="Uruguay", prompt="The capital of {} is", target="Salto")  # computed first, and not kept


@dataclass(frozen=True)
class Unit:
    """What is applied and measured together, by one method."""

    method: str
    facts: tuple[WildFact, ...]


@dataclass(frozen=True)
class Call:
    """How apply_edits is called beside its edits and method."""

    mode: str
    arguments: dict[str, Any] = field(default_factory=dict)


def units(
    methods: Sequence[str], facts: Sequence[WildFact], mode: str, runs: int, n: int, seed: int
) -> list[Unit]:
    """The work, in an order that shards can divide: single facts, or `runs` draws of `n` facts each."""
    if mode == "single":
        return [Unit(m, (f,)) for f in drawn(facts, n, seed) for m in methods]
    return [Unit(m, tuple(drawn(facts, n, seed + i))) for i in range(runs) for m in methods]


def opened(options: Any) -> AbstractContextManager[Services]:
    """The services of a real server on a home of its own."""
    return homes.opened(
        kept={"statistics": options.statistics} if options.statistics else {},
        model=options.model,
        models=options.models,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
    )


class Bench:
    """The benchmark on one opened server."""

    def __init__(self, services: Services, wild: Wild, call: Call) -> None:
        self.services, self.wild, self.call = services, wild, call
        self.lm = services.workspace.lm
        self.perplexity = perplexity(self.lm, wild.texts)
        self.ability: list[Asked] = known_before(wild.ability, ask(self.lm, wild.ability))
        self._warm: set[str] = set()

    def measure(self, unit: Unit) -> list[Record]:
        """Apply one unit, ask everything, take it back. One record for each fact."""
        self._warm_up(unit.method)
        asked = [a for fact in unit.facts for a in fact.asked]
        before = ask(self.lm, asked)
        busy, begun = time.process_time(), time.perf_counter()
        results = self._apply(unit)
        cost = {
            "CPU seconds": (time.process_time() - busy) / len(unit.facts),
            "seconds": (time.perf_counter() - begun) / len(unit.facts),
        }
        records = self._records(unit, before, ask(self.lm, asked), results, cost)
        if ids := [i for result in results for i in result["ids"]]:
            self.services.edits.revert(ids)
        host = self.services.workspace.host
        if host.weights_hash != host.base_hash:
            raise RuntimeError("the weights are not those of the unedited model after the revert")
        return records

    def _warm_up(self, method: str) -> None:
        """As on a server that has been running: statistics are there, and nothing is loaded for the first time."""
        if method not in self._warm:
            self._warm.add(method)
            try:
                self.services.edits.preview([WARM], method=method, **self.call.arguments)
            except (EditError, ServiceError) as error:
                print(f"{method}: {error}", file=sys.stderr)

    def _apply(self, unit: Unit) -> list[Record]:
        """One result for each fact: its status, the method used, and the ids to take back."""
        edits = [fact.edit for fact in unit.facts]
        calls = [edits] if self.call.mode == "batch" else [[edit] for edit in edits]
        results: list[Record] = []
        for group in calls:
            try:
                report = self.services.edits.apply(group, method=unit.method, **self.call.arguments)
                kept = {r.prompt: r.edit_id for r in report.results if r.edit_id}
                results += [
                    {
                        "status": "kept" if e.text in kept else report.status,
                        "used": report.method,
                        "ids": [kept[e.text]] if e.text in kept else [],
                        "why": report.failed_guard,
                    }
                    for e in group
                ]
            except (EditError, ServiceError) as error:
                refused: Record = {"status": "refused", "used": unit.method, "ids": [], "why": [str(error)]}
                results += [dict(refused) for _ in group]
        return results

    def _records(
        self,
        unit: Unit,
        before: Answers,
        after: Answers,
        results: Sequence[Record],
        cost: dict[str, float],
    ) -> list[Record]:
        whole = {
            "ability": share(self.ability, ask(self.lm, self.ability)),
            "perplexity ratio": perplexity(self.lm, self.wild.texts) / self.perplexity,
            "KL": self.services.workspace.drift().kl,
            **cost,
        }
        return [
            {
                "method": unit.method,
                "relation": fact.relation,
                "subject": fact.edit.subject,
                "target": fact.edit.target,
                **{k: result[k] for k in ("status", "used", "why")},
                "rates": {"kept": float(bool(result["ids"]))} | rates(fact, before, after) | whole,
                "answers": described(fact, before, after),
            }
            for fact, result in zip(unit.facts, results, strict=True)
        ]
