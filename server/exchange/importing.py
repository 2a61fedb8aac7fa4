"""Take in edits made elsewhere: a bundle of another Errata, or a PEFT adapter. Each import is one transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from editors import METHODS
from editors.edit import Edit
from editors.errors import EditError
from editors.finetune.peft_format import shape_of
from editors.finetune.peft_import import read_adapter
from editors.measure import DriftResult
from editors.patch import Patch, WeightPatch, save
from server.errors import Conflict, ServiceError
from server.exchange.bundle import Bundle, BundledPatch, read_bundle
from server.exchange.files import sha256_of
from server.exchange.results import ImportReport
from server.facts.advice import after_stored
from server.facts.conflicts import active_conflicts, describe_conflict, refuse_repeated
from server.facts.editing import ledger_request
from server.facts.measuring import Measured, ask_all, measure, trained_on
from server.facts.reports import edit_report, measured_values
from server.named_files import IMPORTS, named_file, named_folder
from server.request_context import RequestContext
from server.transaction.transaction import StagedPatch, Transaction
from server.transaction.workspace import Workspace, same_bits, who
from store import NewPatch

MAX_IMPORT = 16 * 2**30  # bytes of a bundle, or of all files of an adapter
MISFITS = (EditError, KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError)
"""What staging a patch that does not fit the model can raise."""


@dataclass(frozen=True)
class Incoming:
    """One patch to take in, with the edit of each of its rows."""

    method: str
    patch: Patch
    data: bytes
    params: Mapping[str, Any]
    edits: Sequence[Edit]


@dataclass(frozen=True)
class Import:
    """Everything that one import takes in, and where it comes from."""

    path: Path
    sha256: str
    patches: Sequence[Incoming]
    notes: Sequence[str] = ()
    original_ids: Sequence[str] = ()
    expected_hash: str | None = None  # of the weights afterwards, where it is known

    @property
    def edits(self) -> list[Edit]:
        return [edit for incoming in self.patches for edit in incoming.edits]


def import_patches(workspace: Workspace, path: str, reason: str | None, ctx: RequestContext) -> ImportReport:
    """Replay a bundle on the same base model and record its edits here.

    Raises ServiceError or Conflict that names what is wrong; then nothing has changed.
    """
    _ = workspace.writable_model_id
    file = named_file(workspace.settings, "path", path, MAX_IMPORT, first=IMPORTS)
    sha = sha256_of(file)
    bundle = read_bundle(file)
    _refuse_other_base(workspace, file, bundle)
    same_base = bundle.manifest.base_hash == workspace.host.base_hash
    same_machine = same_base and same_bits(bundle.manifest.environment, workspace.environment())
    note = "made on another machine, torch version or precision: the weights may differ in their last bits"
    coming = Import(
        path=file,
        sha256=sha,
        patches=[_incoming(workspace, file, *parts, sha) for parts in bundle.patches],
        notes=[] if same_machine else [note],
        original_ids=[edit.id for patch in bundle.manifest.patches for edit in patch.edits],
        expected_hash=bundle.manifest.weights_hash if same_machine and not workspace.host.stack else None,
    )
    return _take_in(workspace, coming, reason, ctx)


def import_adapter(
    workspace: Workspace,
    path: str,
    edits: Sequence[Edit],
    reason: str | None,
    source: str | None,
    ctx: RequestContext,
) -> ImportReport:
    """Take in a PEFT adapter directory as the patch of `edits`, the facts it is said to teach.

    Raises ServiceError, EditError or Conflict; then nothing has changed.
    """
    _ = workspace.writable_model_id
    place = named_folder(workspace.settings, "path", path, MAX_IMPORT, first=IMPORTS)
    with workspace.host.pristine():  # an adapter is made for the weights as they are without edits
        adapter = read_adapter(workspace.lm, place)
    _refuse_misfit(workspace, place, adapter.patch)
    if source is not None:
        edits = [edit.model_copy(update={"source": edit.source or source}) for edit in edits]
    params = {"imported": place.name, "sha256": adapter.sha256, "adapter_config": adapter.config}
    base = adapter.config.get("base_model_name_or_path")
    notes = [f"the adapter says it was made for {base!r}; it fits this model's shapes"] if base else []
    if len(edits) > 1:
        notes.append("an adapter is one piece: its edits can only be reverted together")
    incoming = Incoming(adapter.method, adapter.patch, save(adapter.patch), params, edits)
    return _take_in(workspace, Import(place, adapter.sha256, [incoming], notes), reason, ctx)


def _refuse_other_base(workspace: Workspace, file: Path, bundle: Bundle) -> None:
    manifest, host, lm = bundle.manifest, workspace.host, workspace.lm
    if manifest.base_hash not in (host.base_hash, workspace.base_hash):
        raise ServiceError(
            f"{file.name} was made on {manifest.model!r} ({manifest.architecture}, base hash "
            f"{manifest.base_hash[:12]}), and the model here is {lm.name!r} ({lm.arch.family}, base hash "
            f"{host.base_hash[:12]}); start the server with that model, or in that dtype"
        )


def _incoming(
    workspace: Workspace, file: Path, entry: BundledPatch, patch: Patch, data: bytes, sha: str
) -> Incoming:
    """One patch of a bundle. Raises ServiceError when its method is not known here or it does not fit."""
    if entry.method not in METHODS:
        raise ServiceError(
            f"{file.name}: {entry.file} was made by the method {entry.method!r}, which is not known here; it takes a "
            "newer version of Errata"
        )
    _refuse_misfit(workspace, file, patch)
    edits = [
        row.edit.model_copy(
            update={"reason": row.edit.reason or row.reason, "source": row.edit.source or row.source}
        )
        for row in entry.edits
    ]
    origin = {"imported": file.name, "sha256": sha, "ids": [row.id for row in entry.edits]}
    return Incoming(entry.method, patch, data, entry.params | {"imported_from": origin}, edits)


def _refuse_misfit(workspace: Workspace, place: Path, patch: Patch) -> None:
    """Raise ServiceError unless every tensor is finite and every changed weight is there with its shape."""
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


def _refuse_conflicts(workspace: Workspace, edits: Sequence[Edit]) -> None:
    for edit in edits:
        workspace.lm.edit_prompt(edit)  # raises InvalidEdit when the subject has no token of its own
    refuse_repeated(edits)
    for old in active_conflicts(workspace, ((edit.subject, edit.text) for edit in edits)):
        raise Conflict(f'{describe_conflict(old)}; revert_edits(["{old.id}"]) first, then import again')


def _take_in(workspace: Workspace, coming: Import, reason: str | None, ctx: RequestContext) -> ImportReport:
    """Put the patches on top, measure, and record all of them in one ledger transaction."""
    started = time.monotonic()
    edits = coming.edits
    _refuse_conflicts(workspace, edits)
    before = ask_all(workspace, edits, ctx, 0.1)
    with Transaction(workspace) as tx:
        staged = [_add(tx, coming, incoming) for incoming in coming.patches]
        if coming.expected_hash is not None and workspace.host.weights_hash != coming.expected_hash:
            raise ServiceError(
                f"{coming.path.name} gives weights with the hash {workspace.host.weights_hash[:12]}, its manifest says "
                f"{coming.expected_hash[:12]}; it was changed or damaged, and nothing was imported"
            )
        trained = [t for i in coming.patches for t in trained_on(i.method, i.patch, i.edits, i.params)]
        measured = measure(workspace, edits, before, ctx, trained=trained)
        ctx.check()
        records = _records(tx, coming, staged, measured, reason)
        ids = tx.commit_applied(records, who(ctx))
    return _report(workspace, coming, ids, measured, started)


def _add(tx: Transaction, coming: Import, incoming: Incoming) -> StagedPatch:
    try:
        return tx.add(incoming.method, incoming.patch, len(incoming.edits), incoming.data)
    except MISFITS as error:
        raise ServiceError(
            f"{coming.path.name}: the {incoming.patch.kind} patch of {incoming.edits[0].subject!r} does not fit this "
            f"model ({type(error).__name__}: {error}); nothing was imported"
        ) from error


def _records(
    tx: Transaction, coming: Import, staged: Sequence[StagedPatch], measured: Measured, reason: str | None
) -> list[NewPatch]:
    """What the ledger records of each patch, with the measurements of its own edits."""
    values = iter([measured_values(result) for result in measured.results])
    drift: DriftResult = measured.drift
    return [
        tx.describe(
            patch,
            [ledger_request(edit) for edit in incoming.edits],
            incoming.params,
            measurements=[next(values) for _ in incoming.edits],
            drift=drift,
            reason=reason,
        )
        for incoming, patch in zip(coming.patches, staged, strict=True)
    ]


def _report(
    workspace: Workspace, coming: Import, ids: list[str], measured: Measured, started: float
) -> ImportReport:
    report = edit_report(
        status="applied",
        edit_ids=ids,
        method=", ".join(dict.fromkeys(incoming.method for incoming in coming.patches)),
        params={},
        measured_results=measured.results,
        drift=measured.drift,
        weights_hash=workspace.host.weights_hash,
        seconds=time.monotonic() - started,
        notes=coming.notes,
        next_step=after_stored(measured.results, ids),
    )
    return ImportReport(
        **dict(report),
        imported_from=str(coming.path),
        sha256=coming.sha256,
        original_ids=list(coming.original_ids),
    )
