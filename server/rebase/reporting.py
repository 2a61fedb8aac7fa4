"""The report of a rebase: counts, ids as ranges, what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.facts import ids
from server.rebase.run import RebaseRun
from server.rebase.state import OUTCOMES, TO_DO
from server.wording import counted, first_words
from store import EditRecord

SHOWN = 10
"""Facts that a report lists."""
_DONE = {
    "right": "right already",
    "kept": "kept by their old patches",
    "anew": "computed anew",
    "there": "there before",
    "left_out": "left out",
}
_PLANNED = _DONE | {"kept": "held by their old patches", "anew": "to be computed anew"}


def planned_report(work: RebaseRun) -> dict[str, Any]:
    """What would be done; what is to do counts as to be computed anew."""
    for old in work.state.of(TO_DO):
        work.state.note(old, "anew")
    return {
        "status": "planned",
        **_shared(work, _PLANNED),
        "state_hash": work.workspace.state_hash,
        "next": f'rebase_edits(plan="{work.job.id}") carries it out; the model must stay as it is until then.',
    }


def final_report(work: RebaseRun, lost: Sequence[str], perplexity: float) -> dict[str, Any]:
    """The result of the job. `lost`: old ids that were carried, or right before, and are not said in the end."""
    state = work.state
    made = [str(state.outcomes[old]["edit"]) for old in state.of("kept", "anew")]
    shared = _shared(work, _DONE)
    carried = len(state.of("right", "kept", "anew", "there"))
    said = f" {carried - len(lost)} of the other {carried} are said in the end." if carried else ""
    return {
        "status": "rebased",
        **shared,
        "summary": shared["summary"] + said,
        "lost": [f"{_line(work, old)}: not said in the end" for old in lost[:SHOWN]],
        "edits": ids.ranges(sorted(made, key=lambda e: int(e[1:]))),
        "measured": _means(state.rates),
        "perplexity_ratio": round(perplexity / state.perplexity, 4),
        "state_hash": work.workspace.state_hash,
        "next": _next(work, lost),
    }


def _shared(work: RebaseRun, words: Mapping[str, str]) -> dict[str, Any]:
    state = work.state
    found = {name: state.of(name) for name in OUTCOMES if state.of(name)}
    counts = ", ".join(f"{len(found[name])} {words[name]}" for name in found)
    left = state.of("left_out")
    lines = [
        f"{_line(work, old)}: {first_words(state.outcomes[old]['why'] or '', 200)}" for old in left[:SHOWN]
    ]
    return {
        "from_model": work.old.described,
        "summary": f"{counted(len(state.outcomes), 'edit')} of {work.old.model.name}: {counts}.",
        "outcomes": {name: {"count": len(some), "edits": ids.ranges(some)} for name, some in found.items()},
        "left_out": lines + ([f"and {len(left) - SHOWN} more"] if len(left) > SHOWN else []),
        "not_carried": work.old.not_carried(),
    }


def _line(work: RebaseRun, old: str) -> str:
    record: EditRecord = work.old.facts[old]
    return f"{old} ({first_words(record.prompt, 80)} -> {first_words(record.target, 40)})"


def _next(work: RebaseRun, lost: Sequence[str]) -> str:
    stays = f"The edits of {work.old.model.name} stay on the ledger: start the server with it to have them."
    if work.state.of("left_out") or lost:
        return f"For what is left out or lost, try preview_edits with another method. {stays}"
    return f"show_edit names the old edit of each new one (request.rebased). {stays}"


def _means(rates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over what was carried, each transaction counted by its edits."""
    flat = [
        {"edits": row["edits"]}
        | {f"forms.{kind}": value for kind, value in row["forms"].items()}
        | {name: row[name] for name in ("subject_locality", "locality") if row[name] is not None}
        for row in rates
    ]
    means = {}
    for name in dict.fromkeys(name for row in flat for name in row if name != "edits"):
        some = [(row[name], row["edits"]) for row in flat if name in row]
        means[name] = round(sum(v * n for v, n in some) / sum(n for _, n in some), 3)
    return means
