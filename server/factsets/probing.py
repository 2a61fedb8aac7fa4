"""The questions that a data set asks beside its facts: rates by its own kinds, before and after a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editors.constants import assumed
from editors.scoring import agrees, same_fact
from server.answering.batch import run_alone
from server.answering.request import Continuation, Request
from server.facts.asking import tokens_for
from server.factsets.fact import FactProbe
from server.factsets.run import CorrectionRun
from server.jobs.job import JobContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction

MOST = assumed(600, "Questions of a data set asked for its rates at most.", "some minutes on two cores")
AT_ONCE = 32


def probe_rates(work: CorrectionRun) -> dict[str, Any]:
    """Rates by kind over the facts that were corrected: answered as it follows, or kept as it was; with their number.

    The side before is the model without this job's edits. Empty where the set has no such questions.
    """
    done = [n for n, s in work.outcomes().items() if s.outcome == "done"]
    asked = _sample([(n, probe) for n in done for probe in work.facts[n].probes])
    wordings = [(n, text) for n in done for text in work.facts[n].paraphrases][:MOST]
    if not asked and not wordings:
        return {}
    texts = list(dict.fromkeys([*(t for _, p in asked for t in p.prompts), *(t for _, t in wordings)]))
    after = _answers(work, texts, "asking the questions of the data set")
    before = _before(work, list(dict.fromkeys(t for _, p in asked if not p.follows for t in p.prompts)))
    held: dict[str, list[bool]] = {}
    for _, probe in asked:
        held.setdefault(probe.kind, []).append(_holds(probe, before, after))
    for n, text in wordings:
        right = work.facts[n].answers
        held.setdefault("rephrase", []).append(any(agrees(text, after[text], a) for a in right))
    return {k: {"rate": round(sum(v) / len(v), 3), "of": len(v)} for k, v in sorted(held.items())}


def _holds(probe: FactProbe, before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """A question that follows is answered rightly in any wording; another one is answered as before."""
    if probe.follows:
        return any(agrees(text, after[text], answer) for text in probe.prompts for answer in probe.answers)
    return all(same_fact(text, before[text], after[text]) for text in probe.prompts)


def _sample(asked: Sequence[tuple[int, FactProbe]]) -> list[tuple[int, FactProbe]]:
    """At most MOST of them, evenly from all."""
    if len(asked) <= MOST:
        return list(asked)
    step = len(asked) / MOST
    return [asked[int(i * step)] for i in range(MOST)]


def _before(work: CorrectionRun, texts: Sequence[str]) -> dict[str, str]:
    """What the model says without the edits of this job."""
    ids = [s.edit_id for s in work.outcomes().values() if s.outcome == "done" and s.edit_id is not None]
    if not texts:
        return {}
    workspace = work.workspace
    with work.job.live_turn(), Transaction(workspace) as tx:
        tx.stage(without(workspace, workspace.ledger.edits(ids)).stack)
        return _ask(work, texts)


def _answers(work: CorrectionRun, texts: Sequence[str], what: str) -> dict[str, str]:
    said: dict[str, str] = {}
    for i in range(0, len(texts), AT_ONCE):
        work.job.report(0.94 + 0.06 * i / len(texts), what)
        with work.job.live_turn():
            said |= _ask(work, texts[i : i + AT_ONCE])
    return said


def _ask(work: CorrectionRun, texts: Sequence[str]) -> dict[str, str]:
    lm = work.workspace.lm
    questions = [Continuation(lm.prompt(text), tokens_for(text)) for text in texts]
    answers = run_alone(lm, Request(questions, ctx=JobContext.of(work.job)))
    return {text: g.text.strip() for text, g in zip(texts, answers.generations, strict=True)}
