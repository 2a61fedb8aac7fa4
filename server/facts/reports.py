"""From measurements to what an agent reads: rates, warnings, what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors.edit import Edit
from editors.measure import DriftResult, Outcome
from server.facts.guard import Guard
from server.results import EditOutcome, EditRow, ProbeOutcome
from store.records import EditRecord

RATES = ("reliability", "generality", "locality", "portability")


def outcome_result(edit: Edit, outcome: Outcome, edit_id: str | None = None) -> EditOutcome:
    return EditOutcome(
        edit_id=edit_id,
        subject=edit.subject,
        prompt=edit.text,
        target=edit.target,
        before=outcome.before,
        after=outcome.after,
        reliability=outcome.reliability,
        generality=outcome.rate("paraphrase"),
        locality=outcome.rate("neighbour"),
        portability=outcome.rate("portability"),
        fluency=outcome.fluency,
        p_target_before=outcome.p_target_before,
        p_target_after=outcome.p_target_after,
        details=[ProbeOutcome(**vars(p)) for p in outcome.probes],
    )


def mean_rate(results: Sequence[EditOutcome], name: str) -> float | None:
    """Mean of a rate over the edits that have it."""
    values = [v for r in results if (v := getattr(r, name)) is not None]
    return sum(values) / len(values) if values else None


def measured_values(result: EditOutcome) -> dict[str, Any]:
    """What the ledger keeps of an outcome."""
    return result.model_dump(exclude={"edit_id", "subject", "prompt", "target"})


def failed_bounds(guard: Guard | None, results: Sequence[EditOutcome], drift: DriftResult) -> list[str]:
    """The bounds of the guard that do not hold, with the measured values."""
    if guard is None:
        return []
    failed = []
    for name in ("reliability", "generality", "locality"):
        bound, value = getattr(guard, f"min_{name}"), mean_rate(results, name)
        if bound is None:
            continue
        if value is None:
            probes = {"generality": "paraphrases", "locality": "neighbours"}[name]
            failed.append(
                f"min_{name} {bound:g}: could not be measured, the edits have no {probes}; give some"
            )
        elif value < bound:
            failed.append(f"min_{name} {bound:g}: measured {value:.3f}")
    if guard.max_drift is not None and drift.kl > guard.max_drift:
        failed.append(f"max_drift {guard.max_drift:g}: measured {drift.kl:.4f} nats")
    return failed


def warnings_of(results: Sequence[EditOutcome], drift: DriftResult) -> list[str]:
    """What a careful reader should know about a report."""
    warnings = []
    missed = [r.subject for r in results if r.reliability < 1]
    if missed:
        warnings.append(f"the model does not answer with the target for: {', '.join(missed[:10])}")
    known = [r.subject for r in results if r.p_target_before > 0.5]
    if known:
        warnings.append(f"the model most likely knew the target already for: {', '.join(known[:10])}")
    if results and all(r.generality is None for r in results):
        warnings.append("no paraphrases were given, so generality was not measured")
    if results and all(r.locality is None for r in results):
        warnings.append("no neighbours were given, so locality was not measured")
    if drift.perplexity_after > 1.1 * drift.perplexity_before:
        warnings.append(
            f"perplexity on the canary texts went from {drift.perplexity_before:.1f} to {drift.perplexity_after:.1f}"
        )
    return warnings


def next_step(status: str, results: Sequence[EditOutcome], ids: Sequence[str]) -> str:
    """One sentence about what to do now."""
    listed = ", ".join(f'"{i}"' for i in ids[:10])
    if status == "rejected":
        return (
            "Nothing was changed. Loosen the bound, change params (fewer contexts or a smaller clamp keep locality; "
            "a larger clamp strengthens a weak edit), or try another method; preview_edits shows the effect."
        )
    if any(r.reliability < 1 for r in results):
        undo = f" and revert_edits([{listed}]) takes it back" if ids else ""
        return f"At least one edit did not take; try params.clamp or params.layer in preview_edits{undo}."
    if status == "previewed":
        return "apply_edits with the same arguments keeps it."
    return f"ask_model(compare_to_base=true) shows the difference; revert_edits([{listed}]) takes it back exactly."


def edit_row(record: EditRecord) -> EditRow:
    shared = {name: getattr(record, name) for name in EditRow.model_fields if name != "edit_id"}
    return EditRow(edit_id=record.id, **shared)
