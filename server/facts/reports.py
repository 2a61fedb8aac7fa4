"""From measurements to what an agent reads: rates, failed bounds, warnings, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editors.canaries import DriftResult
from editors.edit import Edit
from editors.forms.form import Material
from editors.outcomes import Outcome
from server.facts.history_results import EditRow
from server.facts.rates import FORMS, RATE_OF, mean_forms, mean_rate, mean_rates
from server.facts.results import Attempt, Changed, Drift, EditOutcome, EditReport, Nearby, ProbeOutcome
from server.facts.warnings import warnings_of
from server.wording import counted
from store.records import EditRecord

MOST_CHANGED = 20  # facts listed in a report; the ledger has all
MOST_DETAILS = 40  # probes listed in a report
MOST_UNTAUGHT = 3  # edits that are named as known in their own words alone


def edit_outcome(edit: Edit, outcome: Outcome, edit_id: str | None = None) -> EditOutcome:
    """The measurement of one edit as a result."""
    forms = outcome.forms
    return EditOutcome(
        edit_id=edit_id,
        subject=edit.subject,
        prompt=edit.text,
        target=edit.target,
        before=outcome.before,
        after=outcome.after,
        reliability=outcome.reliability,
        **{name: outcome.rate(kind) for name, kind in RATE_OF.items()},
        forms={kind: forms[kind] for kind in FORMS if kind in forms},
        fluency=outcome.fluency,
        looping=outcome.looping,
        p_target_before=outcome.p_target_before,
        p_target_after=outcome.p_target_after,
        details=[ProbeOutcome(**vars(p)) for p in outcome.probes],
    )


def drift_result(drift: DriftResult) -> Drift:
    """A drift as a result."""
    return Drift(**vars(drift))


def edit_row(record: EditRecord) -> EditRow:
    """One line of the ledger as a result."""
    shared = {name: getattr(record, name) for name in EditRow.model_fields if name != "edit_id"}
    return EditRow(edit_id=record.id, **shared)


def measured_values(result: EditOutcome) -> dict[str, Any]:
    """What the ledger keeps of an outcome."""
    values = result.model_dump(exclude={"edit_id", "subject", "prompt", "target"})
    return values | {"details": [{"before": "", **probe} for probe in values["details"]]}


def edit_report(
    *,
    status: Any,
    edit_ids: Sequence[str],
    method: str,
    params: Mapping[str, Any],
    measured_results: Sequence[EditOutcome],
    drift: DriftResult,
    changed: Sequence[Changed] = (),
    perplexity_ratio: float | None = None,
    tried: Sequence[Attempt] = (),
    left_out: Sequence[str] = (),
    weights_hash: str,
    state_hash: str,
    seconds: float,
    method_reason: str = "",
    result_ids: Sequence[str] | None = None,
    failed_guard: Sequence[str] = (),
    nearby: Sequence[Nearby] = (),
    notes: Sequence[str] = (),
    next_step: str,
) -> EditReport:
    """The report of preview, apply, reapply and imports. `result_ids`: the ids of the results, where not `edit_ids`."""
    ids = edit_ids if result_ids is None else result_ids
    results = with_ids(measured_results, ids)
    return EditReport(
        status=status,
        summary=summary(results, changed, perplexity_ratio),
        edit_ids=list(edit_ids),
        method=method,
        method_reason=method_reason,
        params=dict(params),
        **_measured_fields(results, changed, drift, perplexity_ratio),
        tried=list(tried),
        left_out=list(left_out),
        nearby=list(nearby),
        failed_guard=list(failed_guard),
        weights_hash=weights_hash,
        state_hash=state_hash,
        seconds=seconds,
        warnings=[*notes, *warnings_of(results, drift, changed, perplexity_ratio)],
        next=next_step,
    )


def _measured_fields(
    results: Sequence[EditOutcome],
    changed: Sequence[Changed],
    drift: DriftResult,
    perplexity_ratio: float | None,
) -> dict[str, Any]:
    return {
        "results": brief(results),
        **mean_rates(results),
        "forms": mean_forms(results),
        "perplexity_ratio": perplexity_ratio,
        "changed": list(changed[:MOST_CHANGED]),
        "changed_count": len(changed),
        "drift": drift_result(drift),
    }


def summary(
    results: Sequence[EditOutcome], changed: Sequence[Changed], perplexity_ratio: float | None
) -> str:
    """Counts first: how many edits hold, in which forms, and what else changed."""
    said = sum(r.reliability == 1 for r in results)
    parts = [f"{said} of {len(results)} edits are said"] if results else []
    if forms := mean_forms(results):
        parts.append(
            "asked in wordings that were not learned: "
            + ", ".join(f"{kind} {rate:.2f}" for kind, rate in forms.items())
        )
    if (kept := mean_rate(results, "subject_locality")) is not None:
        parts.append(f"other facts of the subjects {kept:.2f}")
    if (kept := mean_rate(results, "locality")) is not None:
        parts.append(f"other subjects {kept:.2f}")
    parts.append(counted(len(changed), "fact") + " changed" if changed else "no known fact changed")
    if perplexity_ratio is not None:
        parts.append(f"perplexity x{perplexity_ratio:.3f}")
    return "; ".join(parts) + "."


def unheld(edits: Sequence[Edit], results: Sequence[EditOutcome]) -> list[str]:
    """What the caller wants kept and what is not: holds that the model did not say before, neighbours that are about
    an edited subject."""
    lines = []
    for edit, result in zip(edits, results, strict=True):
        kept = {probe.prompt for probe in result.details if probe.kind == "hold"}
        lines += [
            f"not held: {hold.prompt!r}{f' -> {hold.answer!r}' if hold.answer else ''}, which the model did not say "
            "before; if it is right, give it as an edit of its own"
            for hold in edit.holds
            if hold.prompt not in kept
        ]
        asked = {probe.prompt for probe in result.details if probe.kind == "neighbour"}
        lines += [
            f"not measured: the neighbour {near.prompt!r} is about an edited subject; give what must stay of it as "
            "`holds`"
            for near in edit.neighbours
            if near.prompt not in asked
        ]
    return lines


def untaught(edits: Sequence[Edit], materials: Sequence[Material]) -> list[str]:
    """Notes on edits whose words name no known relation: no other wordings were learned or asked."""
    lines = []
    for edit, material in zip(edits, materials, strict=True):
        other_words = any(form.kind != "statement" for form in material.measured)
        if not (material.relation or other_words or material.learned_of(edit.paraphrases)):
            lines.append(
                f"{edit.text!r} names no relation that is known here, so it was neither learned nor measured in "
                "other words. Give paraphrases that ask exactly this, plain ones first, with {} for the "
                "subject: every second one is learned, the others are measured."
            )
    return lines[:MOST_UNTAUGHT]


def brief(results: Sequence[EditOutcome]) -> list[EditOutcome]:
    """The results with the probes an agent needs: the caller's own, and those that did not hold."""
    room, short = MOST_DETAILS, []
    for result in results:
        own = ("paraphrase", "neighbour", "portability")
        wanted = [p for p in result.details if not p.held or (p.kind in own and len(results) <= 3)]
        short.append(result.model_copy(update={"details": wanted[:room]}))
        room = max(0, room - len(wanted))
    return short


def with_ids(results: Sequence[EditOutcome], ids: Sequence[str]) -> list[EditOutcome]:
    """Results with the ids of their edits, in order; without ids they stay as they are."""
    if not ids:
        return list(results)
    return [
        result.model_copy(update={"edit_id": edit_id}) for result, edit_id in zip(results, ids, strict=True)
    ]
