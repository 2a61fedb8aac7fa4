"""Whether active edits still hold, and whether the ledger, the patch files and the live weights agree."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from editors.edit import Edit
from editors.forms.form import Material
from editors.measure import Observation, Unchanged, observe
from editors.outcomes import outcomes
from server.errors import ServiceError
from server.facts.history_results import BEFORE_OF, Audit, Integrity
from server.facts.ids import ranges
from server.facts.material import collect
from server.facts.measuring import changed_in, edit_of, trained_on_by_record
from server.facts.neighbours import with_neighbours
from server.facts.rates import mean_forms, mean_rate
from server.facts.recorded_answers import recorded_answers
from server.facts.remembered import facts_found_right
from server.facts.reports import MOST_CHANGED, brief, drift_result, edit_outcome, measured_values, summary
from server.facts.results import EditOutcome
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, fact_edits, who
from store import EditRecord

MOST_KEPT = 2_000
"""Edits whose answers are kept while the server runs."""
REBUILT = "the live weights were rebuilt from the pristine ones and the ledger"


def audit(
    workspace: Workspace,
    edit_ids: Sequence[str] | None,
    repair: bool,
    ctx: RequestContext,
    fluency: bool = False,
    full: bool = False,
) -> Audit:
    """Measure active edits against the pristine model, and check ledger, files and weights.

    It asks the edits' own prompts and the caller's probes; with `full` also every form and the subjects' other facts.
    An edit that was audited in the same way in the present state is not asked again: greedy answers do not change.
    With `repair`, live weights that differ from the ledger are rebuilt first. Raises ServiceError for an edit that is
    not active.
    """
    started = time.monotonic()
    integrity = check_integrity(workspace)
    repaired: list[str] = []
    if repair and not integrity.weights:
        workspace.host.rebuild()
        integrity = check_integrity(workspace)
        if integrity.weights:
            repaired.append(REBUILT)
    records = audited(workspace, edit_ids)
    depth = Depth(full, fluency)
    new, results = measured_at_this_state(workspace, records, ctx, depth, integrity.weights)
    record_audit(workspace, new, results, ctx, integrity.weights)
    return audit_report(workspace, results, len(new), integrity, repaired, time.monotonic() - started)


def audit_report(
    workspace: Workspace,
    results: Sequence[EditOutcome],
    measured_now: int,
    integrity: Integrity,
    repaired: Sequence[str],
    seconds: float,
) -> Audit:
    """The audit of outcomes that were measured at the present state."""
    failing = [r.edit_id for r in results if r.reliability < 1 and r.edit_id]
    changed, forms = changed_in(results), mean_forms(results)
    return Audit(
        summary=summary(results, changed, None) if results else "No edit is active.",
        edits=brief(results),
        forms=forms,
        subject_locality=mean_rate(results, "subject_locality"),
        changed=changed[:MOST_CHANGED],
        changed_count=len(changed),
        measured_now=measured_now,
        holding=len(results) - len(failing),
        failing=failing,
        integrity=integrity,
        drift=drift_result(workspace.drift()),
        repaired=list(repaired),
        weights_hash=workspace.host.weights_hash,
        seconds=seconds,
        next=" ".join(filter(None, [_next(integrity, failing, forms), workspace.elsewhere])),
    )


@dataclass(frozen=True)
class Depth:
    """What an audit asks beside the edits' own prompts and the caller's probes."""

    full: bool = False  # every form, and the subjects' other facts
    fluency: bool = False  # the entropy of a longer text


def record_audit(
    workspace: Workspace,
    new: Collection[str],
    results: Sequence[EditOutcome],
    ctx: RequestContext,
    trusted: bool,
) -> None:
    """Put what was asked now on the ledger. `trusted`: the live weights are those that the state hash names."""
    if new and not workspace.read_only:
        of = {BEFORE_OF: workspace.host.base_hash} if trusted else {}
        values = {r.edit_id: measured_values(r) | of for r in results if r.edit_id and r.edit_id in new}
        workspace.ledger.record_measurements(values, "audit", vars(workspace.drift()), who(ctx))


def audited(workspace: Workspace, edit_ids: Sequence[str] | None) -> list[EditRecord]:
    """The active facts that an audit is about. Raises ServiceError for an edit that is not active."""
    return fact_edits(_records(workspace, edit_ids))


def unasked(workspace: Workspace, records: Sequence[EditRecord], depth: Depth) -> list[EditRecord]:
    """The edits that no audit has measured in this way in the present state."""
    state, recent = workspace.state_hash, workspace.recent
    return [record for record in records if recent.get("audited", (state, record.id, depth)) is None]


def _next(integrity: Integrity, failing: Sequence[str], forms: Mapping[str, float]) -> str:
    if not integrity.weights:
        return (
            "The live weights are not what the ledger says; audit_edits(repair=true) rebuilds the edited tensors, "
            "and starting the server again loads all of them anew."
        )
    if integrity.problems and integrity.chain and integrity.blobs:
        return "integrity.problems names files that another program changed, and what to do."
    if integrity.problems:
        return "The ledger is damaged; integrity.problems names what. Restore the named files from a backup."
    if failing:
        return (
            f"revert_edits({ranges(failing)!r}) takes back those that no longer hold; then apply_edits anew."
        )
    if any(rate < 1 for rate in forms.values()):
        return "Every edit holds in its own words, but not in all other wordings: `forms` has their rates."
    return "Everything holds."


def _records(workspace: Workspace, edit_ids: Sequence[str] | None) -> list[EditRecord]:
    active = workspace.active_edits
    if edit_ids is None:
        return active
    records = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
    known = {record.id for record in active}
    for record in records:
        if record.id not in known:
            raise ServiceError(
                f"{record.id} is {record.status}, so there is nothing to audit; leave edit_ids out to audit all active"
            )
    return records


def measured_at_this_state(
    workspace: Workspace,
    records: Sequence[EditRecord],
    ctx: RequestContext,
    depth: Depth,
    trusted: bool,
) -> tuple[set[str], list[EditOutcome]]:
    """The ids that are asked now, and the outcome of every edit in order.

    `trusted`: the live weights are those that the state hash names; if not, all are asked and nothing is kept.
    """
    state, recent = workspace.state_hash, workspace.recent
    had = {r.id: recent.get("audited", (state, r.id, depth)) for r in records} if trusted else {}
    new = [record for record in records if had.get(record.id) is None]
    for record, outcome in zip(
        new, _measure(workspace, new, ctx, depth, trusted) if new else [], strict=True
    ):
        had[record.id] = outcome
        if trusted:
            recent.put("audited", (state, record.id, depth), outcome, MOST_KEPT)
    return {record.id for record in new}, [had[record.id] for record in records]


def _measure(
    workspace: Workspace, records: Sequence[EditRecord], ctx: RequestContext, depth: Depth, trusted: bool
) -> list[EditOutcome]:
    ctx.progress(0, 2, "asking the pristine model")
    pristine = _pristine(workspace, records, depth.full, trusted)
    edits, materials = [p.edit for p in pristine], [p.material for p in pristine] if depth.full else []
    before = Observation(
        answers={prompt: text for p in pristine for prompt, text in p.observation.answers.items()},
        p_target=tuple(p.observation.p_target[p.index] for p in pristine),
        fluency=(None,) * len(pristine),
        material={asked: text for p in pristine for asked, text in p.observation.material.items()},
    )
    ctx.report(1, 2, "asking the live model")
    same = _as_pristine(workspace)
    after = observe(
        workspace.lm, edits, fluency=depth.fluency, materials=materials, known=before, unchanged=same
    )
    trained = trained_on_by_record(workspace, records, workspace.host.stack)
    measured = outcomes(edits, before, after, workspace.active_subjects, trained, materials)
    return [edit_outcome(e, o, r.id) for e, o, r in zip(edits, measured, records, strict=True)]


def _as_pristine(workspace: Workspace) -> Unchanged | None:
    """Tells prompts that the live model must answer like the pristine one: if only memories are active, all prompts
    that they do not claim."""
    if not workspace.host.unedited:
        return None
    return lambda prompt: workspace.lm.routes.claims([prompt])[0] is None


@dataclass(frozen=True)
class _Pristine:
    """The pristine model's answers about an edit; no edit changes them."""

    edit: Edit  # as measured: with neighbours of our own where the caller gave none
    material: Material
    observation: Observation  # of all that were asked with it
    index: int  # its place there


def _pristine(
    workspace: Workspace, records: Sequence[EditRecord], forms: bool, trusted: bool
) -> list[_Pristine]:
    """The same for every edit; what the ledger does not have is asked.

    With `forms` all is asked, because forms are chosen by the model's answers.
    """
    recent, right = workspace.recent, len(facts_found_right(workspace))
    keys = {record.id: (record.id, forms, right) for record in records}
    found = {record.id: recent.get("pristine", keys[record.id]) for record in records}
    new = [record for record in records if found[record.id] is None]
    if new:
        edits = with_neighbours([edit_of(record) for record in new], workspace.active_subjects)
        known = [None] * len(new) if forms or not trusted else recorded_answers(workspace, new, edits)
        asked = [i for i, observation in enumerate(known) if observation is None]
        told = iter(_asked_pristine(workspace, [edits[i] for i in asked], forms) if asked else [])
        for record, edit, observation in zip(new, edits, known, strict=True):
            one = next(told) if observation is None else _Pristine(edit, Material(), observation, 0)
            found[record.id] = one
            recent.put("pristine", keys[record.id], one, MOST_KEPT)
    return [found[record.id] for record in records]


def _asked_pristine(workspace: Workspace, edits: Sequence[Edit], forms: bool) -> list[_Pristine]:
    with workspace.host.pristine():
        materials = collect(workspace, edits) if forms else [Material()] * len(edits)
        seen = observe(workspace.lm, edits, materials=materials if forms else (), first=True)
    return [
        _Pristine(edit, material, seen, i)
        for i, (edit, material) in enumerate(zip(edits, materials, strict=True))
    ]


def check_integrity(workspace: Workspace) -> Integrity:
    """The ledger's own check, and the hash of the live weights against the one that the stack gives."""
    problems = workspace.ledger.verify()
    expected = workspace.host.weights_hash
    weights = workspace.host.rehash() == expected and _stack_agrees(workspace)
    messages = [str(problem) for problem in (*problems, *workspace.ledger.changed_files())]
    if not weights:
        messages.append("live weights: they are not pristine weights plus the active patches")
    return Integrity(
        chain=not any(problem.kind != "blob" for problem in problems),
        blobs=not any(problem.kind == "blob" for problem in problems),
        weights=weights,
        problems=messages,
    )


def _stack_agrees(workspace: Workspace) -> bool:
    """True when the live stack is the one on the ledger."""
    stack = workspace.host.stack
    if workspace.model_id is None:
        return not stack
    entries = workspace.ledger.stack(workspace.model_id)
    return [(e.patch_id, e.rows, e.blob) for e in entries] == [(a.patch_id, a.rows, a.blob) for a in stack]
