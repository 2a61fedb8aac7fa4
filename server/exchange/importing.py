"""Take in edits made elsewhere: a bundle of another Errata, or a PEFT adapter. Each import is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from editors import METHODS
from editors.edit import Edit
from editors.finetune.peft_format import shape_of
from editors.finetune.peft_import import read_adapter
from editors.patch import Patch, WeightPatch, save
from server.errors import ServiceError
from server.exchange.bundle import Bundle, BundledPatch, read_bundle
from server.exchange.files import sha256_of
from server.exchange.results import ImportReport
from server.exchange.taking_in import Import, Incoming, Wishes, take_in
from server.named_files import IMPORTS, named_file, named_folder
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, same_bits

MAX_IMPORT = 16 * 2**30  # bytes of a bundle, or of all files of an adapter


def import_patches(workspace: Workspace, path: str, wishes: Wishes, ctx: RequestContext) -> ImportReport:
    """Replay a bundle on the same base model and record its edits here.

    Raises ServiceError or Conflict that names what is wrong; then nothing has changed.
    """
    wishes.check(workspace)
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
    return take_in(workspace, coming, wishes, ctx)


def import_adapter(
    workspace: Workspace,
    path: str,
    edits: Sequence[Edit],
    source: str | None,
    wishes: Wishes,
    ctx: RequestContext,
) -> ImportReport:
    """Take in a PEFT adapter directory as the patch of `edits`, the facts it should teach; there may be none.

    Raises ServiceError, EditError or Conflict; then nothing has changed.
    """
    wishes.check(workspace)
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
    if not edits:
        notes.append("no edits were named, so what it teaches was not measured; the active edits were")
    incoming = Incoming(adapter.method, adapter.patch, save(adapter.patch), params, edits, source)
    return take_in(workspace, Import(place, adapter.sha256, [incoming], notes), wishes, ctx)


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
    """One patch of a bundle. Raises ServiceError when its method is unknown here, or when it does not fit the model."""
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
            live = workspace.lm.shape(name)
        except AttributeError:
            raise ServiceError(
                f"{place.name} changes {name}, which this model does not have; nothing was imported"
            ) from None
        if live != shape:
            raise ServiceError(f"{place.name}: the change of {name} has the shape {shape}, the weight {live}")
