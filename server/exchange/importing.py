"""Edits that come into the house: bundles of another Errata, and PEFT adapters, as recorded transactions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from editors import METHODS
from editors.edit import Edit
from editors.finetune.peft_format import shape_of
from editors.finetune.peft_import import read_adapter
from editors.measure import DriftResult, observe, outcomes
from editors.patch import Patch, WeightPatch, save
from server.errors import Conflict, ServiceError
from server.exchange.bundle import Bundle, BundledPatch, read_bundle
from server.exchange.files import find_import, refuse_unless_file, sha256_of
from server.exchange.results import ImportReport
from server.facts.editing import PENDING
from server.facts.reports import mean_rate, measured_values, next_step, outcome_result, warnings_of
from server.request_context import RequestContext
from server.results import EditOutcome
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, digest, drift_result, who
from store import NewPatch
from store.errors import LedgerError


@dataclass(frozen=True)
class Incoming:
    """One patch to be adopted, with the edits it answers by row."""

    method: str
    patch: Patch
    data: bytes
    params: dict[str, Any]
    edits: Sequence[Edit]


@dataclass(frozen=True)
class Origin:
    """Where patches come from."""

    path: Path
    sha256: str
    ids: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _Stage:
    """The live model after one of the incoming patches."""

    active: ActivePatch
    before: str
    after: str
    state: str


def import_patches(workspace: Workspace, path: str, reason: str | None, ctx: RequestContext) -> ImportReport:
    """Replay a bundle on the same base model and record its edits here.

    Raises WorkbenchError or Conflict, naming what is wrong, with nothing changed.
    """
    started = time.monotonic()
    _ = workspace.writable_model_id
    file = find_import(workspace.settings.home, path)
    refuse_unless_file(file)
    sha = sha256_of(file)
    bundle = read_bundle(file)
    _same_base(workspace, file, bundle)
    incoming = [_incoming(workspace, file, *parts, file.name, sha) for parts in bundle.patches]
    ids = [e.id for p in bundle.manifest.patches for e in p.edits]
    expected = None if workspace.host.stack else bundle.manifest.weights_hash
    notes = []
    if bundle.manifest.environment != workspace.environment():
        expected = None
        notes.append("made on another machine or torch version: the weights may differ in their last bits")
    return _adopt(workspace, incoming, Origin(file, sha, ids, notes), reason, expected, ctx, started)


def import_adapter(
    workspace: Workspace,
    path: str,
    edits: Sequence[Edit],
    reason: str | None,
    source: str | None,
    ctx: RequestContext,
) -> ImportReport:
    """Take in a PEFT adapter directory as the patch of `edits`, the facts it is said to teach.

    Raises WorkbenchError, EditError or Conflict, with nothing changed.
    """
    started = time.monotonic()
    _ = workspace.writable_model_id
    place = find_import(workspace.settings.home, path)
    found = read_adapter(workspace.lm, place)
    if source is not None:
        edits = [e.model_copy(update={"source": e.source or source}) for e in edits]
    given = {"imported": place.name, "sha256": found.sha256, "adapter_config": found.config}
    data = save(found.patch)
    incoming = Incoming(found.method, found.patch, data, given, edits)
    _check_fits(workspace, place, found.patch)
    named = found.config.get("base_model_name_or_path")
    notes = [f"the adapter says it was made for {named!r}; it fits this model's shapes"] if named else []
    if len(edits) > 1:
        notes.append("an adapter is one piece: its edits can only be reverted together")
    return _adopt(workspace, [incoming], Origin(place, found.sha256, [], notes), reason, None, ctx, started)


def _same_base(workspace: Workspace, file: Path, bundle: Bundle) -> None:
    told = bundle.manifest
    if told.base_hash != workspace.host.base_hash:
        raise ServiceError(
            f"{file.name} was made on {told.model!r} ({told.architecture}, base hash {told.base_hash[:12]}), and the "
            f"model here is {workspace.lm.name!r} ({workspace.lm.arch.family}, "
            f"base hash {workspace.host.base_hash[:12]}); start the server with that model, or in that dtype"
        )


def _incoming(
    workspace: Workspace, file: Path, told: BundledPatch, patch: Patch, data: bytes, name: str, sha: str
) -> Incoming:
    if told.method not in METHODS:
        raise ServiceError(
            f"{file.name}: {told.file} was made by the method {told.method!r}, which is not known here; it takes a "
            "newer version of Errata"
        )
    _check_fits(workspace, file, patch)
    edits = []
    for row in told.edits:
        edit = row.edit
        edits.append(
            edit.model_copy(update={"reason": edit.reason or row.reason, "source": edit.source or row.source})
        )
    origin = {"imported": name, "sha256": sha, "ids": [e.id for e in told.edits]}
    return Incoming(told.method, patch, data, told.params | {"imported_from": origin}, edits)


def _check_fits(workspace: Workspace, place: Path, patch: Patch) -> None:
    """Every tensor is finite, and every weight it changes is there with its shape."""
    for name, tensor in {**patch.tensors(), **patch.extra}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ServiceError(f"{place.name}: {name} holds values that are not finite; nothing was imported")
    if not isinstance(patch, WeightPatch):
        return
    for name, delta in patch.deltas.items():
        shape = shape_of(delta)
        try:
            live = workspace.lm.weight(name)
        except AttributeError:
            raise ServiceError(
                f"{place.name} changes {name}, which this model does not have; nothing was imported"
            ) from None
        if tuple(live.shape) != shape:
            raise ServiceError(
                f"{place.name}: the change of {name} has the shape {shape}, the weight {tuple(live.shape)}"
            )


def _refuse_conflicts(workspace: Workspace, incoming: Sequence[Incoming]) -> None:
    assert workspace.model_id is not None
    seen: set[tuple[str, str]] = set()
    for edit in (e for i in incoming for e in i.edits):
        workspace.lm.edit_prompt(edit)
        key = (edit.subject.casefold(), " ".join(edit.text.split()).casefold())
        if key in seen:
            raise Conflict(f"{edit.text!r} comes twice; nothing was imported")
        seen.add(key)
        for old in workspace.ledger.find_active(workspace.model_id, edit.subject, edit.text):
            raise Conflict(
                f"edit {old.id} is active for the same subject and prompt ({old.prompt!r} -> {old.target!r}); "
                f'revert_edits(["{old.id}"]) first, then import again'
            )


def _adopt(
    workspace: Workspace,
    incoming: Sequence[Incoming],
    origin: Origin,
    reason: str | None,
    expected: str | None,
    ctx: RequestContext,
    started: float,
) -> ImportReport:
    """Put the patches on top, measure, and record each with its edits."""
    _refuse_conflicts(workspace, incoming)
    edits = [e for i in incoming for e in i.edits]
    ctx.progress(0.1, 1.0, "asking the model")
    before = observe(workspace.lm, edits)
    below = workspace.host.stack
    with workspace.host.trial(below):
        stages = _stages(workspace, incoming, origin)
        if expected is not None and workspace.host.weights_hash != expected:
            raise ServiceError(
                f"{origin.path.name} gives weights with the hash {workspace.host.weights_hash[:12]}, its manifest says "
                f"{expected[:12]}; it was changed or damaged, and nothing was imported"
            )
        ctx.check()
        ctx.progress(0.5, 1.0, "measuring")
        found = outcomes(edits, before, observe(workspace.lm, edits))
        results = [outcome_result(e, o) for e, o in zip(edits, found, strict=True)]
        drift = workspace.drift()
        ctx.check()
        ids = _record(workspace, incoming, stages, results, drift, reason, ctx)
    return _report(workspace, incoming, origin, ids, results, drift, started)


def _stages(workspace: Workspace, incoming: Sequence[Incoming], origin: Origin) -> list[_Stage]:
    stack = list(workspace.host.stack)
    stages = []
    for one in incoming:
        before = workspace.host.weights_hash
        rows = tuple(range(len(one.edits)))
        active = ActivePatch(-1, PENDING, one.method, one.patch, rows, digest(one.data))
        stack.append(active)
        try:
            workspace.host.set_stack(stack)
        except (KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ServiceError(
                f"{origin.path.name}: the {one.patch.kind} patch of {one.edits[0].subject!r} does not fit this model "
                f"({type(error).__name__}: {error}); nothing was imported"
            ) from error
        stages.append(_Stage(active, before, workspace.host.weights_hash, workspace.state_hash))
    return stages


def _record(
    workspace: Workspace,
    incoming: Sequence[Incoming],
    stages: Sequence[_Stage],
    results: Sequence[EditOutcome],
    drift: DriftResult,
    reason: str | None,
    ctx: RequestContext,
) -> list[str]:
    """Record patch by patch; the live stack becomes what the ledger has, also when it fails midway."""
    ids: list[str] = []
    stack = list(workspace.host.stack[: len(workspace.host.stack) - len(stages)])
    try:
        for one, stage in zip(incoming, stages, strict=True):
            mine = results[len(ids) : len(ids) + len(one.edits)]
            new = workspace.ledger.record_applied(
                _new_patch(workspace, one, stage, mine, drift, reason), who(ctx)
            )
            patch = workspace.ledger.get_patch(workspace.ledger.get_edit(new[0]).patch_id)
            stack.append(replace(stage.active, patch_id=patch.id, position=patch.position))
            ids += new
    except LedgerError as error:
        workspace.host.set_stack(stack)
        workspace.host.keep()
        raise ServiceError(
            f"only {', '.join(ids) or 'nothing'} could be recorded and stands: {error}"
        ) from error
    workspace.host.stack = tuple(stack)
    workspace.host.keep()
    return ids


def _new_patch(
    workspace: Workspace,
    one: Incoming,
    stage: _Stage,
    results: Sequence[EditOutcome],
    drift: DriftResult,
    reason: str | None,
) -> NewPatch:
    return NewPatch(
        model_id=workspace.writable_model_id,
        method=one.method,
        params=one.params,
        kind=one.patch.kind,
        blob=one.data,
        requests=[e.model_dump(mode="json") | {"prompt": e.text} for e in one.edits],
        weights_hash_before=stage.before,
        weights_hash_after=stage.after,
        state_hash=stage.state,
        measurements=[measured_values(r) for r in results],
        drift=vars(drift),
        environment=workspace.environment(),
        reason=reason,
    )


def _report(
    workspace: Workspace,
    incoming: Sequence[Incoming],
    origin: Origin,
    ids: list[str],
    results: Sequence[EditOutcome],
    drift: DriftResult,
    started: float,
) -> ImportReport:
    told = [r.model_copy(update={"edit_id": i}) for r, i in zip(results, ids, strict=True)]
    return ImportReport(
        status="applied",
        edit_ids=ids,
        method=", ".join(dict.fromkeys(i.method for i in incoming)),
        params={},
        results=told,
        reliability=mean_rate(told, "reliability"),
        generality=mean_rate(told, "generality"),
        locality=mean_rate(told, "locality"),
        portability=mean_rate(told, "portability"),
        drift=drift_result(drift),
        weights_hash=workspace.host.weights_hash,
        seconds=time.monotonic() - started,
        warnings=[*origin.notes, *warnings_of(told, drift)],
        next=next_step("applied", told, ids),
        imported_from=str(origin.path),
        sha256=origin.sha256,
        original_ids=origin.ids,
    )
