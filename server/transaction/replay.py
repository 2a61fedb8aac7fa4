"""From a loaded model and a ledger to a workbench: replay, check, and say what is damaged."""

from __future__ import annotations

from collections.abc import Callable

from editors.errors import EditError
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch_kinds import load
from server.jobs.runner import JobRunner
from server.jobs.training import WORK, trained_folder
from server.settings import Settings
from server.transaction.host import ActivePatch, ModelHost
from server.transaction.workspace import Workspace
from store import Ledger, StackEntry
from store.errors import BlobError

Report = Callable[[float, float, str], None]


def open_workspace(settings: Settings, lm: LM, ledger: Ledger, progress: Report) -> Workspace:
    """Replay the ledger onto the model. Damage is named and makes the server read-only; what is whole is replayed."""
    progress(0, 3, "hashing the weights")
    host = ModelHost(lm)
    damage = [str(p) for p in ledger.verify()]
    reason = "the server was started read-only" if settings.read_only else ""
    if damage:
        reason = f"the ledger is damaged: {damage[0]}" + (
            f" (and {len(damage) - 1} more)" if damage[1:] else ""
        )
    model_id = ledger.find_model(host.base_hash)
    if model_id is None and not reason:
        model_id = ledger.model(host.base_hash, lm.name, lm.arch.family)
    statistics = Statistics(settings.home / "statistics", host.base_hash, device=lm.device)
    workspace = Workspace(settings, host, ledger, statistics, model_id, reason, damage)
    lm.trained = trained_folder(settings.home, host.base_hash)
    progress(1, 3, "replaying the ledger")
    if model_id is not None:
        _replay(workspace, model_id)
    if not workspace.read_only:
        workspace.jobs = JobRunner(workspace, WORK)
        workspace.jobs.resume()
    progress(3, 3, "ready")
    return workspace


def _replay(workspace: Workspace, model_id: int) -> None:
    stack: list[ActivePatch] = []
    entries = workspace.ledger.stack(model_id)
    for entry in entries:
        try:
            stack.append(_active(workspace.ledger, entry))
        except (BlobError, EditError) as error:
            _damaged(
                workspace,
                f"edits {', '.join(entry.edit_ids[r] for r in entry.rows)} cannot be replayed: {error}",
            )
    workspace.host.set_stack(stack)
    expected = workspace.ledger.expected_weights_hash(model_id)
    if expected is None or expected == workspace.host.weights_hash or len(stack) != len(entries):
        return
    here = workspace.environment()
    if entries and all(e.environment == here for e in entries):
        _damaged(
            workspace,
            f"the replayed weights hash to {workspace.host.weights_hash[:12]}, the ledger says {expected[:12]}",
        )
    else:
        workspace.notes.append(
            "the weights were replayed on another machine or torch version than they were recorded on and differ "
            "from the recorded ones in their last bits"
        )


def _active(ledger: Ledger, entry: StackEntry) -> ActivePatch:
    patch = load(ledger.blobs.get(entry.blob))
    return ActivePatch(entry.patch_id, entry.position, entry.method, patch, entry.rows, entry.blob)


def _damaged(workspace: Workspace, what: str) -> None:
    workspace.damage.append(what)
    workspace.read_only = workspace.read_only or f"the ledger is damaged: {what}"
