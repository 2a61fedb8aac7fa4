"""From measurements to what an agent reads: rates, failed bounds, warnings, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editors.edit import Edit
from editors.measure import DriftResult, Outcome
from server.facts.guard import Guard
from server.facts.results import Drift, EditOutcome, EditReport, EditRow, Nearby, ProbeOutcome
from store.records import EditRecord

PROBES = {"generality": "paraphrase", "locality": "neighbour"}  # rate -> the probes it is measured with


def edit_outcome(edit: Edit, outcome: Outcome, edit_id: str | None = None) -> EditOutcome:
    """The measurement of one edit as a result."""
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


def mean_rate(results: Sequence[EditOutcome], name: str) -> float | None:
    """Mean of a rate over the edits that have it."""
    values = [value for result in results if (value := getattr(result, name)) is not None]
    return sum(values) / len(values) if values else None


def mean_rates(results: Sequence[EditOutcome]) -> dict[str, float | None]:
    """The mean of every rate."""
    return {
        name: mean_rate(results, name) for name in ("reliability", "generality", "locality", "portability")
    }


def measured_values(result: EditOutcome) -> dict[str, Any]:
    """What the ledger keeps of an outcome."""
    return result.model_dump(exclude={"edit_id", "subject", "prompt", "target"})


def edit_report(
    *,
    status: Any,
    edit_ids: Sequence[str],
    method: str,
    params: Mapping[str, Any],
    measured_results: Sequence[EditOutcome],
    drift: DriftResult,
    weights_hash: str,
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
        edit_ids=list(edit_ids),
        method=method,
        method_reason=method_reason,
        params=dict(params),
        results=results,
        **mean_rates(results),
        drift=drift_result(drift),
        nearby=list(nearby),
        failed_guard=list(failed_guard),
        weights_hash=weights_hash,
        seconds=seconds,
        warnings=[*notes, *warnings_of(results, drift)],
        next=next_step,
    )


def with_ids(results: Sequence[EditOutcome], ids: Sequence[str]) -> list[EditOutcome]:
    """Results with the ids of their edits, in order; without ids they stay as they are."""
    if not ids:
        return list(results)
    return [
        result.model_copy(update={"edit_id": edit_id}) for result, edit_id in zip(results, ids, strict=True)
    ]


def _probes(results: Sequence[EditOutcome], kind: str) -> list[ProbeOutcome]:
    return [probe for result in results for probe in result.details if probe.kind == kind]


def _unmeasured(results: Sequence[EditOutcome], kind: str) -> str:
    """Why a rate over probes of a kind could not be measured, and what would help."""
    if _probes(results, kind):
        return f"the edits were trained on every {kind}; give others, or params.use_probes=false"
    return f"the edits have no {kind}s; give some"


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
            failed.append(
                f"min_{name} {bound:g}: could not be measured; {_unmeasured(results, PROBES[name])}"
            )
        elif value < bound:
            failed.append(f"min_{name} {bound:g}: measured {value:.3f}")
    if guard.max_drift is not None and drift.kl > guard.max_drift:
        failed.append(f"max_drift {guard.max_drift:g}: measured {drift.kl:.4f} nats")
    return failed


def warnings_of(results: Sequence[EditOutcome], drift: DriftResult) -> list[str]:
    """What a careful reader should know about a report."""
    warnings = []
    if missed := [r.subject for r in results if r.reliability < 1]:
        warnings.append(f"the model does not answer with the target for: {', '.join(missed[:10])}")
    if looping := [r.subject for r in results if r.looping]:
        warnings.append(f"the answer only repeats itself, which is no hit, for: {', '.join(looping[:10])}")
    if known := [r.subject for r in results if r.p_target_before > 0.5]:
        warnings.append(f"the model most likely knew the target already for: {', '.join(known[:10])}")
    for rate, kind in PROBES.items():
        if trained := [p for p in _probes(results, kind) if p.trained]:
            warnings.append(
                f"trained on {len(trained)} of {len(_probes(results, kind))} {kind}s, which are left out of {rate}"
            )
        if results and all(getattr(r, rate) is None for r in results):
            warnings.append(f"{rate} was not measured: {_unmeasured(results, kind)}")
    if drift.perplexity_after > 1.1 * drift.perplexity_before:
        warnings.append(
            f"perplexity on the canary texts went from {drift.perplexity_before:.1f} to {drift.perplexity_after:.1f}"
        )
    return warnings
