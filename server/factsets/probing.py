"""The metrics of a data set for the facts of a correction: its own questions, by its own kinds, before and after.

edit_success   the fact is said (KnowEdit; MQuAKE: edit-wise)
instance_wise  every fact of a case is said (MQuAKE)
a kind that follows from a fact (portability, multi_hop, Logical_Generalization ...): answered rightly in any wording
a kind that must stay (locality, Relation_Specificity, Forgetfulness ...): answered as before
portability, locality: the means over all questions that follow, and that must stay, where there are several kinds
fluency        entropy of what is generated for the fact's prompt, in bits

Questions that follow are asked for every fact that was tried, so that a failed one counts; questions that must stay
are asked where an edit was made. `before` is the same of the model without this correction's edits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from editors.constants import limit
from editors.measure import fluencies
from editors.scoring import agrees, same_fact
from server.answering.batch import run_alone
from server.answering.request import Continuation, Request
from server.facts.asking import tokens_for
from server.factsets.fact import Fact, FactProbe
from server.factsets.run import CorrectionRun
from server.jobs.job import JobContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction

MOST = limit(
    600,
    "questions of a data set that are asked for its rates, at most",
    "time: some minutes on two cores; of more, a sample is asked",
)
FLUENT = limit(
    32,
    "facts whose fluency is measured, at most",
    "time: a few seconds on two cores; of the others it is not measured",
)
AT_ONCE = 32

Said = Mapping[str, str]
T = TypeVar("T")


def probe_rates(work: CorrectionRun) -> dict[str, Any]:
    """The table of the data set; empty where the set has no questions beside its facts."""
    outcomes = work.outcomes()
    done = [n for n, s in outcomes.items() if s.outcome == "done"]
    tried = [n for n, s in outcomes.items() if s.outcome in ("done", "failed")]
    touched = {case for n in tried for case in work.facts[n].cases}
    with_cases = [n for n, fact in work.facts.items() if n in tried or touched & set(fact.cases)]
    follows = [
        p for n in with_cases for p in (*_rewordings(work.facts[n]), *work.facts[n].probes) if p.follows
    ]
    stays = [p for n in done for p in work.facts[n].probes if not p.follows]
    asked = _sample([*follows, *stays], MOST)
    if not asked:
        return {}
    texts = list(dict.fromkeys(text for probe in asked for text in probe.prompts))
    fluent = _sample([work.facts[n].text for n in done], FLUENT)
    after = _ask_all(work, texts, (0.94, 0.97), edited=True)
    before = _ask_all(work, texts, (0.97, 0.99), edited=False)
    known = work.states()
    said = {n for n in work.facts if n in known and known[n].verdict == "agrees"}
    table = {"edit_success": _rate(n in said for n in tried)}
    if cases := sorted({case for n in with_cases for case in work.facts[n].cases}):
        parts = ({n for n, fact in work.facts.items() if case in fact.cases} for case in cases)
        table["instance_wise"] = _rate(said >= part for part in parts)
    table |= _by_kind(asked, before, after)
    if fluent:
        table["fluency"] = {
            "mean": _fluency(work, fluent, edited=True),
            "before": _fluency(work, fluent, edited=False),
            "of": len(fluent),
        }
    return table


def _rewordings(fact: Fact) -> list[FactProbe]:
    """The fact's paraphrases as questions that follow."""
    return [
        FactProbe(kind="rephrase", follows=True, prompts=(t,), answers=fact.answers) for t in fact.paraphrases
    ]


def _by_kind(asked: Sequence[FactProbe], before: Said, after: Said) -> dict[str, Any]:
    """Rates by kind, and over all that follow and all that must stay where there are several kinds of it."""
    table = {}
    for follows, whole in ((True, "portability"), (False, "locality")):
        mine = [p for p in asked if p.follows is follows]
        kinds = sorted({p.kind for p in mine})
        for kind in kinds:
            table[kind] = _rates([p for p in mine if p.kind == kind], before, after)
        beyond = [p for p in mine if p.kind != "rephrase"]
        if len({p.kind for p in beyond}) > 1:
            table[whole] = _rates(beyond, before, after)
    return table


def _rates(probes: Sequence[FactProbe], before: Said, after: Said) -> dict[str, Any]:
    if not probes[0].follows:
        return _rate(
            all(same_fact(text, before[text], after[text]) for text in probe.prompts) for probe in probes
        )
    found = _rate(_answered(probe, after) for probe in probes)
    return {
        "rate": found["rate"],
        "before": _rate(_answered(p, before) for p in probes)["rate"],
        "of": len(probes),
    }


def _answered(probe: FactProbe, said: Said) -> bool:
    """Whether a question that follows is answered rightly in any wording."""
    return any(agrees(text, said[text], answer) for text in probe.prompts for answer in probe.answers)


def _rate(held: Iterable[bool]) -> dict[str, Any]:
    values = list(held)
    return {"rate": round(statistics.fmean(values), 3) if values else None, "of": len(values)}


def _sample(values: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly from all."""
    step = max(1.0, len(values) / most)
    return [values[int(i * step)] for i in range(min(most, len(values)))]


def _ask_all(work: CorrectionRun, texts: Sequence[str], span: tuple[float, float], *, edited: bool) -> Said:
    """Answers to distinct prompts, a few in each turn at the model, so that others are not kept waiting."""
    said: dict[str, str] = {}
    start, end = span
    for i in range(0, len(texts), AT_ONCE):
        work.job.report(start + (end - start) * i / len(texts), "asking the questions of the data set")
        part = texts[i : i + AT_ONCE]
        said |= _with(work, partial(_ask, work, part), edited=edited)
    return said


def _with(work: CorrectionRun, read: Callable[[], T], *, edited: bool) -> T:
    """What `read` finds on the live model, or on it without the edits of this job."""
    workspace = work.workspace
    with work.job.live_turn():
        if edited:
            return read()
        ids = [s.edit_id for s in work.outcomes().values() if s.outcome == "done" and s.edit_id is not None]
        with Transaction(workspace) as tx:
            tx.stage(without(workspace, workspace.ledger.edits(ids)).stack)
            return read()


def _ask(work: CorrectionRun, texts: Sequence[str]) -> Said:
    lm = work.workspace.lm
    questions = [Continuation(lm.prompt(text), tokens_for(text)) for text in texts]
    answers = run_alone(lm, Request(questions, ctx=JobContext.of(work.job)))
    return {text: g.text.strip() for text, g in zip(texts, answers.generations, strict=True)}


def _fluency(work: CorrectionRun, texts: Sequence[str], *, edited: bool) -> float:
    lm = work.workspace.lm
    return round(statistics.fmean(_with(work, lambda: fluencies(lm, texts), edited=edited)), 2)
