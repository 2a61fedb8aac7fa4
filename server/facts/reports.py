"""From measurements to what an agent reads: rates, failed bounds, warnings, what to do next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from editors.edit import Edit
from editors.measure import DriftResult, Outcome
from server.facts.guard import Guard
from server.facts.results import (
    Attempt,
    Changed,
    Drift,
    EditOutcome,
    EditReport,
    EditRow,
    Nearby,
    ProbeOutcome,
)
from server.wording import counted, first_words
from store.records import EditRecord

PROBES = {"generality": "paraphrase", "locality": "neighbour"}  # rate -> the probes it is measured with
FORMS = ("statement", "reworded", "chat", "chat_reworded", "language")
MOST_CHANGED = 20  # facts listed in a report; the ledger has all
MOST_DETAILS = 40  # probes listed in a report
RATES = ("reliability", "generality", "locality", "portability", "subject_locality")


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
        forms={kind: outcome.forms[kind] for kind in FORMS if kind in outcome.forms},
        subject_locality=outcome.rate("sibling"),
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
    return {name: mean_rate(results, name) for name in RATES}


def mean_forms(results: Sequence[EditOutcome]) -> dict[str, float]:
    """The mean of every form over the edits that have it."""
    found = {kind: [r.forms[kind] for r in results if kind in r.forms] for kind in FORMS}
    return {kind: sum(values) / len(values) for kind, values in found.items() if values}


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
        results=brief(results),
        **mean_rates(results),
        forms=mean_forms(results),
        perplexity_ratio=perplexity_ratio,
        changed=list(changed[:MOST_CHANGED]),
        changed_count=len(changed),
        tried=list(tried),
        left_out=list(left_out),
        drift=drift_result(drift),
        nearby=list(nearby),
        failed_guard=list(failed_guard),
        weights_hash=weights_hash,
        seconds=seconds,
        warnings=[*notes, *warnings_of(results, drift, changed)],
        next=next_step,
    )


def summary(
    results: Sequence[EditOutcome], changed: Sequence[Changed], perplexity_ratio: float | None
) -> str:
    """Counts first: how many edits hold, in which forms, and what else changed."""
    said = sum(r.reliability == 1 for r in results)
    parts = [f"{said} of {len(results)} edits are said"] if results else []
    if forms := mean_forms(results):
        parts.append("forms not learned: " + ", ".join(f"{kind} {rate:.2f}" for kind, rate in forms.items()))
    if (kept := mean_rate(results, "subject_locality")) is not None:
        parts.append(f"other facts of the subjects {kept:.2f}")
    if (kept := mean_rate(results, "locality")) is not None:
        parts.append(f"other subjects {kept:.2f}")
    parts.append(counted(len(changed), "fact") + " changed" if changed else "no known fact changed")
    if perplexity_ratio is not None:
        parts.append(f"perplexity x{perplexity_ratio:.3f}")
    return "; ".join(parts) + "."


def unheld(edits: Sequence[Edit], results: Sequence[EditOutcome]) -> list[str]:
    """The holds of a call that could not be kept: their answers are not what the model said before the edits."""
    lines = []
    for edit, result in zip(edits, results, strict=True):
        kept = {probe.prompt for probe in result.details if probe.kind == "hold"}
        lines += [
            f"not held: {hold.prompt!r}{f' -> {hold.answer!r}' if hold.answer else ''}, which the model did not say "
            "before; where it is right, give it as an edit of its own"
            for hold in edit.holds
            if hold.prompt not in kept
        ]
    return lines


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


def _probes(results: Sequence[EditOutcome], kind: str) -> list[ProbeOutcome]:
    return [probe for result in results for probe in result.details if probe.kind == kind]


def _unmeasured(results: Sequence[EditOutcome], kind: str) -> str:
    """Why a rate over probes of a kind could not be measured, and what would help."""
    if _probes(results, kind):
        return f"the edits were trained on every {kind}; give others, or params.use_probes=false"
    return f"the edits have no {kind}s; give some"


def failed_bounds(
    guard: Guard,
    results: Sequence[EditOutcome],
    drift: DriftResult,
    ratio: float,
    changed: Sequence[Changed],
    holds: Collection[str] = (),
) -> list[str]:
    """The bounds of the guard that do not hold, with the measured values. `holds`: prompts the call wants kept.

    Standing bounds must be filled in (`Guard.standing`). A bound that the caller named fails where it cannot be
    measured. `ratio`: perplexity after the change, divided by that before.
    """
    forms = mean_forms(results)
    values = mean_rates(results) | {kind: forms.get(kind) for kind in FORMS}
    failed = []
    for name, value in values.items():
        bound = getattr(guard, f"min_{name}", None)
        if bound is None:
            continue
        if value is None and guard.given(f"min_{name}"):
            failed.append(f"min_{name} {bound:g}: could not be measured; {_why_unmeasured(results, name)}")
        elif value is not None and value < bound:
            failed.append(f"min_{name} {bound:g}: measured {value:.3f}{_named(results, name)}")
    if guard.max_perplexity_ratio is not None and not ratio <= guard.max_perplexity_ratio:
        failed.append(f"max_perplexity_ratio {guard.max_perplexity_ratio:g}: measured {ratio:.3f}")
    if guard.max_drift is not None and not drift.kl <= guard.max_drift:
        failed.append(f"max_drift {guard.max_drift:g}: measured {drift.kl:.4f} nats")
    broken = [c.prompt for c in changed if c.prompt in holds]
    if broken and guard.stands("holds"):
        failed.append(f"holds: {len(broken)} that the call gave would not be kept, {broken[0]!r} among them")
    lost = [c.edit_id for c in changed if c.edit_id]
    if guard.max_lost_edits is not None and len(lost) > guard.max_lost_edits:
        failed.append(
            f"max_lost_edits {guard.max_lost_edits}: {', '.join(lost[:10])} would not hold any more"
        )
    if guard.max_changed is not None and len(changed) > guard.max_changed:
        failed.append(f"max_changed {guard.max_changed}: {counted(len(changed), 'fact')} changed")
    return failed


def missed(results: Sequence[EditOutcome], guard: Guard) -> dict[int, str]:
    """The edits that break a bound by themselves, by their index, and how."""
    reasons: dict[int, str] = {}
    for i, result in enumerate(results):
        if guard.min_reliability is not None and result.reliability < min(1.0, guard.min_reliability):
            reasons[i] = f"the model says {result.after!r}"
            continue
        values: dict[str, float | None] = {name: getattr(result, name) for name in RATES} | dict(result.forms)
        for name, value in values.items():
            bound = getattr(guard, f"min_{name}", None)
            if bound is not None and value is not None and value < bound:
                reasons[i] = f"{name} {value:.2f}, less than {bound:g}"
                break
    return reasons


def _why_unmeasured(results: Sequence[EditOutcome], name: str) -> str:
    if name in PROBES:
        return _unmeasured(results, PROBES[name])
    if name == "subject_locality":
        return "the model knows no other fact of the subject that was not held; give some as holds, or leave it out"
    return "the edits have no form of that kind"


def _named(results: Sequence[EditOutcome], name: str) -> str:
    """The edits below 1, where a bound on all of them names too few to guess."""
    if name != "reliability" or len(results) < 2:
        return ""
    missed = [f"{r.subject} -> {r.target}" for r in results if r.reliability < 1]
    return f"; not said: {', '.join(missed[:10])}" + (f" and {len(missed) - 10} more" if missed[10:] else "")


def _of_forms(results: Sequence[EditOutcome]) -> list[str]:
    """The kinds of form in which edits do not always hold, each with an example."""
    lines = []
    for kind, rate in mean_forms(results).items():
        probes = (
            p for r in results for p in r.details if p.form == kind and p.kind in ("form", "paraphrase")
        )
        example = next(
            (f", such as {p.prompt!r} -> {first_words(p.after, 40)!r}" for p in probes if not p.held), ""
        )
        if rate < 1:
            lines.append(f"{kind} forms hold at {rate:.2f}{example}")
    return lines


def warnings_of(
    results: Sequence[EditOutcome], drift: DriftResult, changed: Sequence[Changed] = ()
) -> list[str]:
    """What a careful reader should know about a report."""
    warnings = []
    if broken := [c.edit_id for c in changed if c.edit_id]:
        warnings.append(f"active edits that held before and do not now: {', '.join(broken)}")
    if missed := [r.subject for r in results if r.reliability < 1]:
        warnings.append(f"the model does not answer with the target for: {', '.join(missed[:10])}")
    warnings += _of_forms(results)
    if looping := [r.subject for r in results if r.looping]:
        warnings.append(f"the answer only repeats itself, which is no hit, for: {', '.join(looping[:10])}")
    if known := [r.subject for r in results if r.p_target_before > 0.5]:
        warnings.append(f"the model most likely knew the target already for: {', '.join(known[:10])}")
    for rate, kind in PROBES.items():
        if trained := [p for p in _probes(results, kind) if p.trained]:
            warnings.append(
                f"trained on {len(trained)} of {len(_probes(results, kind))} {kind}s, which are left out of {rate}"
            )
        unmeasured = results and all(getattr(r, rate) is None for r in results)
        in_forms = rate == "generality" and not _probes(results, kind) and mean_forms(results)
        if unmeasured and not in_forms:
            warnings.append(f"{rate} was not measured: {_unmeasured(results, kind)}")
    if drift.perplexity_after > 1.1 * drift.perplexity_before:
        warnings.append(
            f"perplexity on the canary texts went from {drift.perplexity_before:.1f} to {drift.perplexity_after:.1f}"
        )
    return warnings
