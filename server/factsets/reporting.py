"""The report of a correction: counts, failures, damage; facts as ranges of numbers. Everything else is on the
ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.facts import ids
from server.factsets.phases import CorrectionState
from server.factsets.requests import OUTCOMES
from server.factsets.run import CorrectionRun
from server.factsets.saving import SHOWN, ranges
from server.wording import counted, first_words
from store import FactState


def planned_report(work: CorrectionRun, version: int) -> dict[str, Any]:
    """The plan, before anything is changed."""
    outcomes = work.outcomes()
    return {
        "status": "planned",
        "set": work.name,
        "version": version,
        "summary": _summary(outcomes),
        "outcomes": _outcomes(outcomes),
        "planned": _lines(work, outcomes, "planned", 2 * SHOWN),
        "skipped": _lines(work, outcomes, "skipped"),
        "next": _after_plan(work, version, "skipped" in {s.outcome for s in outcomes.values()}),
    }


def _after_plan(work: CorrectionRun, version: int, skipped: bool) -> str:
    """How to carry a plan out, and what makes it invalid."""
    way = f'correct_facts("{work.name}", plan="{work.job.id}") carries it out.'
    if not skipped:
        return way
    return (
        f"To mend what is skipped, do it first and plan again: saving the set makes this plan, for version {version}, "
        f"invalid. Else {way}"
    )


def report(work: CorrectionRun, progress: CorrectionState, rates: Mapping[str, Any]) -> dict[str, Any]:
    """The result of the job, all of it short."""
    outcomes = work.outcomes()
    with work.job.live_turn():
        perplexity = work.workspace.drift().perplexity_after
        state = work.workspace.state_hash
    edits = [s.edit_id for s in outcomes.values() if s.outcome == "done" and s.edit_id is not None]
    result: dict[str, Any] = {
        "status": "corrected",
        "set": work.name,
        "version": progress.version,
        "summary": _summary(outcomes),
        "outcomes": _outcomes(outcomes),
        **{name: _lines(work, outcomes, name) for name in ("failed", "lost", "skipped")},
        "edits": ids.ranges(sorted(edits, key=lambda e: int(e[1:]))),
        "perplexity_ratio": round(perplexity / progress.perplexity, 4),
        "state_hash": state,
        "next": _next(work, outcomes),
    }
    measured = {
        **{f"forms.{kind}": _mean(progress, "forms", kind) for kind in _kinds(progress)},
        **{name: _mean(progress, name) for name in ("subject_locality", "locality")},
    }
    result["measured"] = {name: value for name, value in measured.items() if value is not None}
    if rates:
        result["data_set"] = dict(rates)
    return result


_WORDS = {
    "planned": "to be corrected",
    "done": "corrected",
    "right": "were right",
    "failed": "failed",
    "skipped": "skipped",
    "lost": "were right and are not now",
}


def _summary(outcomes: Mapping[int, FactState]) -> str:
    """Counts in words."""
    counts = {name: sum(s.outcome == name for s in outcomes.values()) for name in OUTCOMES}
    shown = [f"{counts[name]} {words}" for name, words in _WORDS.items() if counts[name]]
    return f"{counted(len(outcomes), 'fact')}: {', '.join(shown)}."


def _lines(work: CorrectionRun, outcomes: Mapping[int, FactState], name: str, most: int = SHOWN) -> list[str]:
    """The facts with an outcome, one line each: what the model says, what is right, why."""
    found = [n for n, state in outcomes.items() if state.outcome == name]
    lines = []
    for n in found[:most]:
        fact, state = work.facts[n], outcomes[n]
        said = first_words(state.answer or "", 40)
        why = f" ({first_words(state.why, 160)})" if state.why else ""
        lines.append(
            f"#{n} {first_words(fact.text, 80)}: says {said!r}, right {first_words(fact.answer, 40)!r}{why}"
        )
    if len(found) > most:
        lines.append(f'and {len(found) - most} more: show_fact_set("{work.name}", kind="{name}")')
    return lines


def _next(work: CorrectionRun, outcomes: Mapping[int, FactState]) -> str:
    found = {state.outcome for state in outcomes.values()}
    if found & {"failed", "lost"}:
        return (
            f'show_fact_set("{work.name}", kind="failed") has the reasons; correct_facts again tries what failed, for '
            'example with policy {"method": "..."}; export_fact_set writes the state of each fact.'
        )
    if "skipped" in found:
        return (
            "The skipped facts need a decision: correct the list and save_facts again, or change the policy."
        )
    return f'check_facts(set="{work.name}") whenever you want to know whether it still holds.'


def _outcomes(outcomes: Mapping[int, FactState]) -> dict[str, dict[str, Any]]:
    """Facts by outcome: how many, and their numbers as ranges."""
    found: dict[str, list[int]] = {}
    for n, state in outcomes.items():
        found.setdefault(str(state.outcome), []).append(n)
    return {
        name: {"count": len(found[name]), "numbers": ranges(found[name])}
        for name in OUTCOMES
        if name in found
    }


def _kinds(progress: CorrectionState) -> list[str]:
    return list(dict.fromkeys(kind for rates in progress.rates for kind in rates["forms"]))


def _mean(progress: CorrectionState, name: str, kind: str | None = None) -> float | None:
    """The mean of a rate over the batches, each counted by its edits."""
    values = [
        (value, rates["edits"])
        for rates in progress.rates
        if (value := rates[name].get(kind) if kind is not None else rates[name]) is not None
    ]
    weight = sum(edits for _, edits in values)
    return round(sum(value * edits for value, edits in values) / weight, 3) if weight else None
