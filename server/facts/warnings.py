"""Warnings of a report: the bounds that failed, what does not hold, and what was not measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from editors.canaries import DriftResult
from server.facts.guard import Guard
from server.facts.rates import FORMS, RATE_OF, RATES, mean_forms, mean_rates, probes_of_kind
from server.facts.results import (
    Changed,
    EditOutcome,
)
from server.wording import counted, first_words


def _unmeasured(results: Sequence[EditOutcome], kind: str) -> str:
    """Why a rate over probes of a kind could not be measured, and what would help."""
    noun = "portability probe" if kind == "portability" else kind
    if probes_of_kind(results, kind):
        return f"the edits were trained on every {noun}; give others, or params.use_probes=false"
    return f"the edits have no {noun}s; give some"


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
    if name == "subject_locality":
        return "the model knows no other fact of the subject that was not held; give some as holds, or leave it out"
    if name in RATE_OF:
        return _unmeasured(results, RATE_OF[name])
    return "the edits have no form of that kind"


def _named(results: Sequence[EditOutcome], name: str) -> str:
    """Names the edits below 1, if a bound on the mean failed."""
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
    results: Sequence[EditOutcome],
    drift: DriftResult,
    changed: Sequence[Changed] = (),
    ratio: float | None = None,
) -> list[str]:
    """What a careful reader should know about a report."""
    warnings = []
    if broken := [c.edit_id for c in changed if c.edit_id]:
        warnings.append(f"active edits that held before and do not now: {', '.join(broken)}")
    if missed := [r.subject for r in results if r.reliability < 1]:
        warnings.append(f"the model does not answer with the target for: {', '.join(missed[:10])}")
    warnings += _of_forms(results)
    if looping := [r.subject for r in results if r.looping]:
        warnings.append(
            f"the answer only repeats itself, which does not count, for: {', '.join(looping[:10])}"
        )
    if known := [r.subject for r in results if r.p_target_before > 0.5]:
        warnings.append(f"the model most likely knew the target already for: {', '.join(known[:10])}")
    for rate in ("generality", "locality"):
        kind = RATE_OF[rate]
        if trained := [p for p in probes_of_kind(results, kind) if p.trained]:
            warnings.append(
                f"trained on {len(trained)} of {len(probes_of_kind(results, kind))} {kind}s, left out of {rate}"
            )
        unmeasured = results and all(getattr(r, rate) is None for r in results)
        in_forms = rate == "generality" and not probes_of_kind(results, kind) and mean_forms(results)
        if unmeasured and not in_forms:
            warnings.append(f"{rate} was not measured: {_unmeasured(results, kind)}")
    if drift.perplexity_after > 1.1 * drift.perplexity_before:
        warnings.append(
            f"all active edits together moved the perplexity on the canary texts from {drift.perplexity_before:.1f} to "
            f"{drift.perplexity_after:.1f}" + ("" if ratio is None else f"; this call x{ratio:.3f}")
        )
    return warnings
