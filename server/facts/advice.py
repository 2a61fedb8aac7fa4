"""What to do next after an edit. The method itself says what can be tried (`Editor.hint`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from editors import METHODS
from editors.advice import Evidence, Problem
from editors.canaries import DriftResult
from editors.model.lm import LM
from server.facts.ids import ranges
from server.facts.results import Changed, EditOutcome

TOO_STRONG = (
    "min_locality", "min_subject_locality", "max_drift", "max_perplexity_ratio", "max_changed",
    "max_lost_edits", "holds",
)  # fmt: skip
"""Bounds that fail because an edit moves too much else."""
TOO_MUCH = 2.0
"""If an import multiplies the perplexity of ordinary text by this much, it is most likely a mistake."""
STANDING = {
    "min_reliability": "reliability",
    "min_subject_locality": "subject_locality",
    "max_perplexity_ratio": "perplexity",
    "max_lost_edits": "active_edits",
    "holds": "holds",
}
MISSING_PROBES = "could not be measured"


def after_edit(
    lm: LM,
    status: str,
    method: str,
    params: Mapping[str, Any],
    results: Sequence[EditOutcome],
    ids: Sequence[str],
    failed: Sequence[str],
    *,
    changed: Sequence[Changed] = (),
    weak: bool = False,
    auto: bool = False,
) -> str:
    """One or two sentences about what to do after preview or apply.

    `weak`: the edits hold too seldom in other forms. `auto`: other ways were tried already.
    """
    missed = any(result.reliability < 1 for result in results)
    seen = evidence_of(results, changed)
    kept = "apply_edits(preview_id=...) keeps exactly this." if status == "previewed" else ""
    if status == "rejected":
        way_out = (
            _after_failed_bounds(lm, method, params, failed, seen) if not auto else _after_all_ways(failed)
        )
        return f"Nothing was changed. {way_out}{_partial(results)}{_switch_off(failed)}"
    undo = f"{_undo(ids)} takes it back." if ids else ""
    if missed:
        return _joined("At least one edit did not take.", _hint(lm, method, params, "too_weak", seen), undo)
    if failed:
        return f"apply_edits would reject it. {_after_failed_bounds(lm, method, params, failed, seen)}"
    if weak:
        way_out = _after_all_ways(()) if auto else _hint(lm, method, params, "too_weak", seen)
        return _joined("It holds too seldom in other wordings.", way_out, kept, undo)
    return kept or f"{_compare(results)} shows the difference; {_undo(ids)} takes it back exactly."


def evidence_of(results: Sequence[EditOutcome], changed: Sequence[Changed] = ()) -> Evidence:
    """The prompts that showed edits to be too weak or too strong."""
    forms = [p for r in results for p in r.details if p.kind in ("form", "paraphrase") and not p.trained]
    return Evidence(
        own=[result.prompt for result in results],
        unsaid=[result.prompt for result in results if result.reliability < 1],
        held=[p.prompt for p in forms if p.held],
        missed=[p.prompt for p in forms if not p.held],
        moved=[each.prompt for each in changed],
    )


def _compare(results: Sequence[EditOutcome]) -> str:
    """The call that shows the corrected model beside the pristine one."""
    prompt = json.dumps(results[0].prompt, ensure_ascii=False) if results else "..."
    return f"ask_model(prompt={prompt}, compare_to_base=true)"


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def after_stored(results: Sequence[EditOutcome], ids: Sequence[str]) -> str:
    """The same after a reapply or an import: a stored patch has no parameters to try."""
    if any(result.reliability < 1 for result in results):
        return (
            f"At least one edit does not hold now. {_undo(ids)} takes it back; apply_edits then computes it again on "
            "the model as it is."
        )
    return f"{_compare(results)} shows the difference; {_undo(ids)} takes it back exactly."


def after_import(
    status: str,
    results: Sequence[EditOutcome],
    drift: DriftResult,
    ids: Sequence[str],
    failed: Sequence[str],
    broken: Sequence[str],
) -> str:
    """The same after an import: keep it or not, or train it more gently where it was made."""
    undo = f" {_undo(ids)} takes it back exactly." if ids else ""
    if failed:
        kept = (
            "Nothing was changed." if status == "rejected" else "Without dry_run the guard would reject it."
        )
        return (
            f"{kept} Loosen the bound, or import an adapter trained more gently (fewer steps, a lower rank)."
        )
    if drift.perplexity_after > TOO_MUCH * drift.perplexity_before:
        return (
            "The model reads ordinary text far worse with it. Check that it was made for this base model, and "
            f"that its init_lora_weights is right.{undo}"
        )
    if broken:
        return f"{', '.join(ranges(broken))} no longer hold; revert and apply them anew on top of it.{undo}"
    if any(result.reliability < 1 for result in results):
        return f"At least one of its facts does not hold on this model; apply_edits can teach it.{undo}"
    if status == "previewed":
        return "The same call without dry_run keeps it."
    return f"{_compare(results)} shows the difference.{undo}"


def _after_failed_bounds(
    lm: LM, method: str, params: Mapping[str, Any], failed: Sequence[str], seen: Evidence
) -> str:
    measured = [bound for bound in failed if MISSING_PROBES not in bound]
    if not measured:
        return "Give the probes that failed_guard names, or leave those bounds out."
    strong = any(bound.startswith(TOO_STRONG) for bound in measured)
    return f"{_hint(lm, method, params, 'too_strong' if strong else 'too_weak', seen)} Or loosen the bound."


def _after_all_ways(failed: Sequence[str]) -> str:
    if all(MISSING_PROBES in bound for bound in failed):
        return "Give the probes that failed_guard names, or leave those bounds out."
    return "`tried` lists every way that was tried and what it gave."


def _partial(results: Sequence[EditOutcome]) -> str:
    held = sum(result.reliability == 1 for result in results)
    return " partial=true keeps those that hold and names the others." if 0 < held < len(results) else ""


def _switch_off(failed: Sequence[str]) -> str:
    """How to keep it anyway: standing bounds are switched off by name."""
    names = [name for bound, name in STANDING.items() if any(f.startswith(bound) for f in failed)]
    return f' To keep it anyway: guard={{"off": {json.dumps(names)}}}.' if names else ""


def _hint(lm: LM, method: str, params: Mapping[str, Any], problem: Problem, seen: Evidence) -> str:
    """What the method advises, as a sentence about preview_edits."""
    editor = METHODS[method]
    advice = editor.hint(lm, editor.params.model_validate(dict(params)), problem, seen)
    if not advice.params:
        return f"{advice.text[:1].upper()}{advice.text[1:]}."
    return f"In preview_edits, {advice.text}."


def _undo(ids: Sequence[str]) -> str:
    listed = ", ".join(f'"{each}"' for each in ranges(ids))
    return f"revert_edits([{listed}])"
