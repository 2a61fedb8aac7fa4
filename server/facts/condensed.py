"""Reports about many edits, short: counts, what does not hold, and every damage; the rest is on the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from server.facts.history_results import BEFORE_OF, Audit, EditDetail, Measurement
from server.facts.ids import named, ranges
from server.facts.results import Changed, EditOutcome, EditReport, RevertReport
from server.wording import counted

Detail = Literal["brief", "full"]

FEW = 5
"""Edits up to which a report has the outcome of each."""
MISSES = 4
"""Probes of one edit that do not hold, each time it was measured."""
SHOWN = 8
"""Outcomes of edits that do not hold, in a report about more."""
CHANGED = 12
"""Changed facts in a report about more; their count is always given."""
NEARBY = 8
LONGEST = 160
"""Characters of a text in a report about many edits."""

_Report = TypeVar("_Report", bound=EditReport | Audit)


def condensed(report: _Report, detail: Detail = "brief") -> _Report:
    """The report as an agent needs it; with detail="full", or about a few edits, as it is."""
    outcomes = report.results if isinstance(report, EditReport) else report.edits
    if detail == "full" or len(outcomes) <= FEW:
        return report
    missed = [outcome for outcome in outcomes if _misses(outcome)]
    shown = [_short(outcome) for outcome in missed[:SHOWN]]
    changes = {
        "changed": [_short_change(each) for each in report.changed[:CHANGED]],
        "not_listed": _not_listed(len(outcomes), len(missed), report.changed_count),
    }
    if isinstance(report, EditReport):
        ids = [outcome.edit_id for outcome in missed if outcome.edit_id]
        about = {"results": shown, "failing": ranges(ids), "holding": len(outcomes) - len(missed)}
        rest = {"edit_ids": named(report.edit_ids), "nearby": report.nearby[:NEARBY], "params": {}}
        return report.model_copy(update={**changes, **about, **rest})
    failing = {"edits": shown, "failing": ranges(report.failing)}
    return report.model_copy(update={**changes, **failing})


def condensed_revert(report: RevertReport, detail: Detail = "brief") -> RevertReport:
    """The same for a revert: ids as ranges where they are many, and the first answers."""
    if detail == "full" or len(report.reverted) <= FEW:
        return report
    return report.model_copy(
        update={
            "reverted": named(report.reverted),
            "unchanged": named(report.unchanged),
            "computed_on_top": named(report.computed_on_top),
            "restored": report.restored[:FEW],
        }
    )


def condensed_edit(shown: EditDetail, detail: Detail = "brief") -> EditDetail:
    """What an agent needs of one edit: what was asked for, what holds, what does not, and what happened to it."""
    if detail == "full":
        return shown
    latest = shown.measurements[-1:] if len(shown.measurements) > 1 else []
    patch = {
        name: value for name, value in shown.patch.items() if name in ("kind", "blob", "bytes", "damage")
    }
    events = [event.model_copy(update={"payload": {}}) for event in shown.events]
    return shown.model_copy(
        update={
            "request": _filled(shown.request),
            "params": {},
            "patch": patch,
            "located": _filled(shown.located) if shown.located else None,
            "batch": named(shown.batch) if len(shown.batch) <= FEW else ranges(shown.batch),
            "measurements": [_measured(each) for each in [*shown.measurements[:1], *latest]],
            "events": events[-SHOWN:],
        }
    )


def _measured(measurement: Measurement) -> Measurement:
    """The rates with four significant digits, and the probes that did not hold."""
    filled = _filled({k: v for k, v in measurement.values.items() if k != BEFORE_OF})
    values = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in filled.items()}
    probes = [
        _filled(p)
        for p in measurement.values.get("details", ())
        if not p.get("held") and not p.get("trained")
    ]
    shown = [{k: _cut(v) if isinstance(v, str) else v for k, v in p.items()} for p in probes[:MISSES]]
    kept = {"details": [{**probe, "held": False} for probe in shown]}
    return measurement.model_copy(update={"values": values | kept})


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without empty fields."""
    return {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and value not in ("", [], (), {})
    }


def _misses(outcome: EditOutcome) -> bool:
    return outcome.reliability < 1 or outcome.looping


def _short(outcome: EditOutcome) -> EditOutcome:
    texts = {
        name: _cut(getattr(outcome, name)) for name in ("subject", "prompt", "target", "before", "after")
    }
    return outcome.model_copy(update={**texts, "details": [], "fluency": None})


def _short_change(change: Changed) -> Changed:
    texts = {name: _cut(getattr(change, name)) for name in ("prompt", "before", "after")}
    return change.model_copy(update=texts)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _not_listed(edits: int, missed: int, changed: int) -> str:
    """Names what is counted here and listed elsewhere."""
    holding = edits - missed
    parts: Sequence[str] = [f"{counted(holding, 'edit')} that {'holds' if holding == 1 else 'hold'}"]
    if missed > SHOWN:
        parts = [*parts, f"{missed - SHOWN} that do not"]
    if changed > CHANGED:
        parts = [*parts, f"{changed - CHANGED} changed facts"]
    return f"{', '.join(parts)}: show_edit has each, detail='full' all."
