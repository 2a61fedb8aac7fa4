"""Opens a workspace: replays the ledger onto the loaded model, checks the result, and says what is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editors.errors import EditError
from editors.finetune.shared_weights import off_shared_weights
from editors.learned.trained_folder import TrainedFolder
from editors.memory.relation_bank import RelationBank
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch_kinds import load
from server.settings import Settings
from server.transaction.bases import (
    PRECISION,
    Base,
    WeightsIn,
    elsewhere_note,
    find_base,
    precision_note,
    tokenizer_note,
)
from server.transaction.host import ActivePatch, ModelHost
from server.transaction.made import MadeOnLedger
from server.transaction.workspace import Workspace, same_bits
from store import Ledger, StackEntry
from store.errors import BlobError

log = logging.getLogger("errata.startup")

Progress = Callable[[float, float, str], None]
MOVED = "moved_off_shared_weight"
"""The event after which these edits act beside a weight that two modules share, no longer in it."""


def open_workspace(
    settings: Settings, lm: LM, ledger: Ledger, progress: Progress, weights_in: WeightsIn | None = None
) -> Workspace:
    """Replay the ledger onto the model.

    Damage is named in the workspace and makes it read-only; what is intact is replayed. `weights_in` reads the
    model's files in another precision, to find the edits that were made on them in that one.
    """
    progress(0, 3, "hashing the weights")
    host = ModelHost(lm)
    damage = [str(problem) for problem in ledger.verify()]
    read_only = "the server was started read-only" if settings.read_only else ""
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        read_only = f"the ledger is damaged: {damage[0]}{more}"
    base = find_base(ledger, host, weights_in)
    model_id = base.model_id
    if model_id is None and not read_only:
        model_id = ledger.model(host.base_hash, lm.name, lm.arch.family)
    made = MadeOnLedger(ledger, lambda: not workspace.read_only)
    statistics = Statistics(settings.home / "statistics", base.base_hash, device=lm.device, made=made)
    workspace = Workspace(
        settings, host, ledger, statistics, made, model_id, read_only, damage, recorded_base=base.base_hash
    )
    lm.extension(TrainedFolder).path = trained_folder(settings.home, base.base_hash)
    lm.extension(RelationBank).keep_in(
        settings.home / "relations" / host.base_hash[:16], lambda: host.unedited and not workspace.read_only
    )
    progress(1, 3, "replaying the ledger")
    if model_id is not None:
        _replay(workspace, model_id, base)
    workspace.elsewhere = elsewhere_note(ledger, lm, model_id)
    workspace.notes += filter(None, [workspace.elsewhere])
    for note in workspace.notes:
        log.warning("%s", note)
    progress(3, 3, "ready")
    return workspace


def trained_folder(home: Path, base_hash: str) -> Path:
    """Where the trained editors of one model are kept."""
    return home / "trained" / base_hash[:16]


def _replay(workspace: Workspace, model_id: int, base: Base) -> None:
    ledger, host = workspace.ledger, workspace.host
    entries = ledger.stack(model_id)
    stack: list[ActivePatch] = []
    for entry in entries:
        try:
            stack.append(_active_patch(ledger, entry, host.lm))
        except (BlobError, EditError) as error:
            ids = ", ".join(entry.edit_ids[row] for row in entry.rows)
            _add_damage(workspace, f"edits {ids} cannot be replayed: {error}")
    try:
        host.set_stack(stack)
    except EditError as error:
        _add_damage(workspace, f"the active edits cannot be put on the model: {error}")
        return
    here = workspace.environment()
    workspace.notes += filter(None, [tokenizer_note(here["tokenizer"], entries)])
    if base.live_hash != host.base_hash:
        _change_precision(workspace, model_id, entries)
    elif len(stack) == len(entries):
        moved = [e for e, a in zip(entries, stack, strict=True) if e.kind != a.patch.kind]
        if moved and ledger.expected_weights_hash(model_id) != host.weights_hash:
            _record_moved(workspace, model_id, moved)
        else:
            _compare(workspace, model_id, entries)


def active_stack(workspace: Workspace, model_id: int) -> list[ActivePatch]:
    """The patches that the ledger says are active, in its order. Raises BlobError or EditError."""
    ledger, lm = workspace.ledger, workspace.host.lm
    return [_active_patch(ledger, entry, lm) for entry in ledger.stack(model_id)]


def _record_moved(workspace: Workspace, model_id: int, moved: Sequence[StackEntry]) -> None:
    """Record that edits of 0.1.0, which changed a weight that two modules share, now act on one of them only."""
    ids = [entry.edit_ids[row] for entry in moved for row in entry.rows]
    workspace.notes.append(
        f"{', '.join(ids)} changed one of two modules that share a weight (a head tied to the embeddings), and "
        f"was written into both; it now acts on that one only, as in PEFT, and can be reverted"
    )
    if not workspace.read_only:
        workspace.ledger.record_event(
            MOVED,
            {"edits": ids},
            model_id=model_id,
            weights_hash=workspace.host.weights_hash,
            state_hash=workspace.state_hash,
        )


def _change_precision(workspace: Workspace, model_id: int, entries: Sequence[StackEntry]) -> None:
    """Note and record that the edits now act on the same weights in another precision."""
    here = workspace.environment()
    if entries:
        workspace.notes.append(precision_note(here["dtype"], entries))
    if workspace.read_only:
        return
    host = workspace.host
    workspace.ledger.record_event(
        PRECISION,
        {"base_hash": host.base_hash, "dtype": here["dtype"], "environment": here},
        model_id=model_id,
        weights_hash=host.weights_hash,
        state_hash=workspace.state_hash,
    )


def _compare(workspace: Workspace, model_id: int, entries: Sequence[StackEntry]) -> None:
    """Compare the hashes after a replay with those that the last change recorded."""
    ledger, host = workspace.ledger, workspace.host
    weights = ledger.expected_weights_hash(model_id)
    state = ledger.expected_state_hash(model_id)
    if weights is None:
        return
    if weights == host.weights_hash:
        if state is not None and state != workspace.state_hash:
            _add_damage(workspace, "the patches beside the weights are not those of the last recorded change")
        return
    last = ledger.last_event(PRECISION, {}, model_id=model_id)
    rebuilt = {} if last is None else last.payload["environment"]
    if entries and all(_same_machine(workspace, entry.environment, rebuilt) for entry in entries):
        _add_damage(
            workspace,
            f"the replayed weights have the hash {host.weights_hash[:12]}, the ledger says {weights[:12]}",
        )
    else:
        workspace.notes.append(
            "the edits were recorded on another machine or torch version, so the replayed weights differ from the "
            "recorded ones in their last bits"
        )


def _same_machine(workspace: Workspace, recorded: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> bool:
    """True when a recorded environment gives the same bits here.

    `rebuilt` is where the edits of another precision were last rebuilt; empty when they never were.
    """
    here = workspace.environment()
    if rebuilt and recorded.get("dtype") != here["dtype"]:
        recorded = rebuilt
    return same_bits(recorded, here)


def _active_patch(ledger: Ledger, entry: StackEntry, lm: LM) -> ActivePatch:
    patch = off_shared_weights(lm, load(ledger.blobs.get(entry.blob)))
    return ActivePatch(entry.patch_id, entry.position, entry.method, patch, entry.rows, entry.blob)


def _add_damage(workspace: Workspace, what: str) -> None:
    workspace.damage.append(what)
    workspace.read_only = workspace.read_only or f"the ledger is damaged: {what}"
