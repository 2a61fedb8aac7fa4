"""Measure edits on the live model: what it answers, how well the edits hold, and how far it has moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from editors import METHODS
from editors.canaries import DriftResult
from editors.edit import Edit
from editors.forms.form import Material
from editors.measure import Observation, Unchanged, observe
from editors.outcomes import outcomes
from editors.patch import Patch, trained_prompts
from editors.steering.stack import unsteered
from server.errors import ServiceError
from server.facts.first_answers import first_answers
from server.facts.material import collect
from server.facts.neighbours import with_neighbours
from server.facts.reports import edit_outcome
from server.facts.results import Changed, EditOutcome
from server.facts.watching import Watched, lost, watch
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace
from store import EditRecord

JUDGED_BY = "judged by"
MOST_JUDGED = 200
"""Edits whose forms, facts and neighbours are kept."""


@dataclass(frozen=True)
class Before:
    """The model's answers before a change: about the edits, their subjects' other facts, and the active edits."""

    edits: Sequence[Edit]  # as measured: with neighbours of our own where the caller gave none
    materials: Sequence[Material]
    observation: Observation
    watched: Sequence[Watched]
    perplexity: float  # of the live model on the canary texts

    def only(self, rows: Sequence[int]) -> Before:
        """The same for some of the edits."""
        seen = self.observation
        return replace(
            self,
            edits=[self.edits[i] for i in rows],
            materials=[self.materials[i] for i in rows],
            observation=replace(
                seen,
                p_target=tuple(seen.p_target[i] for i in rows),
                fluency=tuple(seen.fluency[i] for i in rows),
            ),
        )


@dataclass(frozen=True)
class Measured:
    """The outcome of every edit, the drift of the whole model, and every fact that was lost."""

    results: list[EditOutcome]
    drift: DriftResult
    changed: list[Changed]
    perplexity_ratio: float  # after this change, divided by before it


def ask_before(
    workspace: Workspace,
    edits: Sequence[Edit],
    ctx: RequestContext,
    at: float,
    replaced: Sequence[EditRecord] = (),
    judged: int | None = None,
) -> Before:
    """Ask the live model everything that the edits will be judged by, and collect their materials.

    Call it before anything is staged. `at`: the call's progress, 0..1. `replaced`: active edits of the same facts,
    which are retired; what the model said without them is asked of the original model.
    `judged`: how many edits are judged by more than their own prompts, the first ones; left out: all.
    """
    most = len(edits) if judged is None else judged
    ctx.report(at, 1.0, "asking the model")
    with unsteered(workspace.lm):  # an edit is the same with steering on or off
        materials = collect(workspace, edits[:most], replaced) if edits else []
    materials += [Material()] * (len(edits) - most)
    measured = [*with_neighbours(edits[:most], workspace.active_subjects), *edits[most:]]
    for edit, near, material in zip(edits[:most], measured, materials, strict=False):
        workspace.recent.put(JUDGED_BY, _key(edit), (near, material), MOST_JUDGED)
    observation = observe(workspace.lm, measured, materials=materials, forms=False, first=True)
    observation = first_answers(workspace, measured, observation, replaced)
    watched = watch(workspace, edits, replaced)
    return Before(measured, materials, observation, watched, workspace.drift().perplexity_after)


def judged_by(workspace: Workspace, edits: Sequence[Edit]) -> tuple[list[Edit], list[Material]]:
    """The edits with neighbours, forms and other facts of their subjects, for callers that only ask these prompts.

    An edit that was made lately keeps the prompts it was judged by then. For the others the pristine model is asked.
    Call it while holding the model.

    The result is kept for every state of the model, although another state might choose other facts of the subject.
    This does no harm: a push takes only prompts from it, and asks the model as it is now.
    """
    recent = workspace.recent
    keys = [_key(edit) for edit in edits]
    found = [recent.get(JUDGED_BY, key) for key in keys]
    new = [i for i, pair in enumerate(found) if pair is None]
    if new:
        asked = [edits[i] for i in new]
        with workspace.host.pristine():
            materials = collect(workspace, asked)
        near = with_neighbours(asked, workspace.active_subjects)
        for i, edit, material in zip(new, near, materials, strict=True):
            found[i] = edit, material
            recent.put(JUDGED_BY, keys[i], found[i], MOST_JUDGED)
    return [edit for edit, _ in found], [material for _, material in found]


def _key(edit: Edit) -> str:
    """The fields of an edit that decide which prompts it is judged by."""
    said_apart = {"prompt": edit.text, "previous": None, "reason": None, "source": None}
    return edit.model_copy(update=said_apart).model_dump_json()


def measure(
    workspace: Workspace,
    before: Before,
    ctx: RequestContext,
    trained: Sequence[Collection[str]] = (),
    unchanged: Unchanged | None = None,
) -> Measured:
    """Compare the live model with what was observed before the edits.

    `trained` are, for each edit, the prompts its patch was trained on; they are left out of the rates. `unchanged`
    says of a prompt that it is answered as before; it is not asked again.
    """
    edits, materials = before.edits, before.materials
    ctx.report(0.87, 1.0, "asking the model")
    after = observe(workspace.lm, edits, materials=materials, known=before.observation, unchanged=unchanged)
    measured = outcomes(edits, before.observation, after, trained=trained, materials=materials)
    ctx.report(0.95, 1.0, "measuring drift")
    results = [edit_outcome(edit, outcome) for edit, outcome in zip(edits, measured, strict=True)]
    drift = workspace.drift()
    changed = [*changed_in(results), *lost(workspace, before.watched)]
    return Measured(results, drift, changed, drift.perplexity_after / before.perplexity)


def changed_in(results: Sequence[EditOutcome]) -> list[Changed]:
    """The facts around the edits that were right before and are not now, each once."""
    found: dict[str, Changed] = {}
    for probe in (p for result in results for p in result.details):
        kind = probe.kind
        if not probe.held and kind in ("neighbour", "sibling", "hold") and probe.prompt not in found:
            found[probe.prompt] = Changed(
                prompt=probe.prompt, before=probe.before, after=probe.after, kind=kind
            )
    return list(found.values())


def trained_on(
    method: str, patch: Patch, edits: Sequence[Edit], params: Mapping[str, Any]
) -> list[frozenset[str]]:
    """For each edit of a patch, the prompts that the patch was trained on besides its edits' own."""
    prompts = trained_prompts(patch)
    if editor := METHODS.get(method):
        with suppress(ValidationError):  # parameters of another version: the patch's own record is used
            prompts = editor.trained_prompts(patch, edits, editor.params.model_validate(params))
    return [prompts] * len(edits)


def trained_on_by_record(
    workspace: Workspace, records: Sequence[EditRecord], stack: Sequence[ActivePatch]
) -> list[frozenset[str]]:
    """The same for edits of the ledger whose patches stand in `stack`.

    Raises ServiceError where one does not: in a read-only server, whose writer has recorded it during this call.
    """
    patches = {active.patch_id: active for active in stack}
    if missing := [record.id for record in records if record.patch_id not in patches]:
        raise ServiceError(
            f"another server has recorded {', '.join(missing[:5])} during this call; nothing was measured. Call again."
        )
    trained: list[frozenset[str]] = []
    for record in records:
        edits = [edit_of(other) for other in records if other.patch_id == record.patch_id]
        params = workspace.ledger.get_patch(record.patch_id).params
        trained.append(trained_on(record.method, patches[record.patch_id].patch, edits, params)[0])
    return trained


def edit_of(record: EditRecord) -> Edit:
    """The request of a ledger row."""
    return Edit.model_validate({k: v for k, v in record.request.items() if k in Edit.model_fields})
