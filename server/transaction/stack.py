"""Other stacks made from the live one: without some edits, or with some more."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from editors.finetune.shared_weights import off_shared_weights
from editors.patch import Patch, save
from editors.patch_kinds import load
from server.errors import ServiceError
from server.methods import editor_named
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace
from store import EditRecord, RemovedBlob

Restack = Mapping[int, bytes | None]
"""Patch id -> its live bytes from now on; None when none of its edits is active any more."""


class Restacked(NamedTuple):
    """A stack, and the new live bytes of every patch that differs in it from the live one."""

    stack: list[ActivePatch]
    restack: dict[int, bytes | None]


def digest(data: bytes) -> str:
    """The name of a serialised patch among the blobs."""
    return hashlib.sha256(data).hexdigest()


def without(
    workspace: Workspace, edits: Sequence[EditRecord], whole: Sequence[ActivePatch] | None = None
) -> Restacked:
    """The live stack, or `whole`, without some active edits."""
    gone: dict[int, set[int]] = {}
    for edit in edits:
        gone.setdefault(edit.patch_id, set()).add(edit.row)
    stack: list[ActivePatch] = []
    restack: dict[int, bytes | None] = {}
    for active in workspace.host.stack if whole is None else whole:
        rows = tuple(r for r in active.rows if r not in gone.get(active.patch_id, ()))
        if rows == active.rows:
            stack.append(active)
        elif rows:
            smaller, data = _with_rows(workspace, active.patch_id, active.method, rows)
            stack.append(replace(active, patch=smaller, rows=rows, blob=digest(data)))
            restack[active.patch_id] = data
        else:
            restack[active.patch_id] = None
    return Restacked(stack, restack)


def with_edits(workspace: Workspace, edits: Sequence[EditRecord]) -> Restacked:
    """The live stack with some inactive edits back in their old places, in ledger order."""
    stack = {a.patch_id: a for a in workspace.host.stack}
    restack: dict[int, bytes | None] = {}
    for patch_id in dict.fromkeys(e.patch_id for e in edits):
        record = workspace.ledger.get_patch(patch_id)
        had = stack[patch_id].rows if patch_id in stack else ()
        coming = [e for e in edits if e.patch_id == patch_id]
        rows = tuple(sorted({*had, *(e.row for e in coming)}))
        try:
            patch, data = _with_rows(workspace, patch_id, record.method, rows)
        except RemovedBlob as error:
            raise ServiceError(f"{', '.join(e.id for e in coming)} cannot come back: {error}") from error
        stack[patch_id] = ActivePatch(patch_id, record.position, record.method, patch, rows, digest(data))
        restack[patch_id] = data
    return Restacked(sorted(stack.values(), key=lambda a: a.position), restack)


def _with_rows(workspace: Workspace, patch_id: int, method: str, rows: Sequence[int]) -> tuple[Patch, bytes]:
    """The patch of one call with only some of its rows active; always made from the whole patch."""
    full = load(workspace.ledger.patch_bytes(workspace.ledger.get_patch(patch_id).source_blob))
    if len(rows) == len(workspace.ledger.batch(patch_id)):
        return off_shared_weights(workspace.lm, full), save(full)
    patch = editor_named(method).subset(full, rows, workspace.statistics)
    return off_shared_weights(workspace.lm, patch), save(patch)
