"""The only way to change the state of the live model: stage, measure, judge, then commit or leave all as it was.

    with Transaction(workspace) as tx:
        tx.stage(stack)                      # the live model has these patches now
        new = tx.add("rome", patch, rows=2)  # and a new one on top, which the ledger does not know yet
        ...measure and judge...
        tx.commit_applied([tx.describe(new, ...)], who)

Whatever raises before the commit returns, the weights, the stack, the hashes and the live patches are as they
were, and nothing is on the ledger. A preview or a trial simply never commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from editors.canaries import DriftResult
from editors.patch import Patch, save
from server.transaction.host import ActivePatch
from server.transaction.stack import Restack, digest
from server.transaction.workspace import Workspace
from store import Approval, NewPatch, Who

PENDING = 2**62
"""Position of a patch that is not on the ledger yet: after all others."""


@dataclass(frozen=True)
class StagedPatch:
    """A new patch on top of the live model, with the hashes before and after it."""

    active: ActivePatch
    data: bytes  # the serialised patch
    weights_hash_before: str
    weights_hash_after: str
    state_hash: str


class Transaction:
    """One change of state. Use it as a context manager while holding the model's lock.

    Transactions may be nested (a trial inside an apply); only the outermost one can commit.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._host = workspace, workspace.host
        self._before = workspace.host.snapshot()
        self._start_hash = workspace.host.weights_hash
        self._base_hash = self._start_hash  # what an applied patch records as "before"
        self._committed = False

    def __enter__(self) -> Self:
        if not self._host.open_transactions:
            self._host.began = self._before
        self._host.open_transactions += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.open_transactions -= 1
        if not self._host.open_transactions:
            self._host.began = None
        if not self._committed:
            self._host.restore(self._before)

    def stage(self, stack: Sequence[ActivePatch]) -> None:
        """Make the live model have exactly these patches."""
        self._host.set_stack(stack)

    def retry(self, stack: Sequence[ActivePatch]) -> None:
        """Take off what was added and stage these patches again, to add something else."""
        self._host.set_stack(stack)
        self._base_hash = self._start_hash

    def add(self, method: str, patch: Patch, rows: int, data: bytes | None = None) -> StagedPatch:
        """Put a new patch with this many rows on top of the live model. `data`: its bytes, when known."""
        data = save(patch) if data is None else data
        before = self._base_hash
        new = ActivePatch(-1, PENDING, method, patch, tuple(range(rows)), digest(data))
        self._host.set_stack([*self._host.stack, new])
        self._base_hash = self._host.weights_hash
        return StagedPatch(new, data, before, self._host.weights_hash, self._workspace.state_hash)

    def describe(
        self,
        staged: StagedPatch,
        requests: Sequence[Mapping[str, Any]],
        params: Mapping[str, Any],
        *,
        measurements: Sequence[Mapping[str, Any]] = (),
        drift: DriftResult | None = None,
        seconds: float = 0.0,
        reason: str | None = None,
        source: str | None = None,
    ) -> NewPatch:
        """What the ledger records of a staged patch; `requests` and `measurements` have one entry per row."""
        return NewPatch(
            model_id=self._workspace.writable_model_id,
            method=staged.active.method,
            params=params,
            kind=staged.active.patch.kind,
            blob=staged.data,
            requests=requests,
            weights_hash_before=staged.weights_hash_before,
            weights_hash_after=staged.weights_hash_after,
            state_hash=staged.state_hash,
            measurements=measurements,
            drift=None if drift is None else vars(drift),
            environment=self._workspace.environment(),
            seconds=seconds,
            reason=reason,
            source=source,
        )

    # --- the four ways to end ------------------------------------------------------------------

    def commit_applied(
        self,
        patches: Sequence[NewPatch],
        who: Who,
        *,
        replaced: Sequence[str] = (),
        restack: Restack | None = None,
        approval: Approval | None = None,
    ) -> list[str]:
        """Record the patches that were added, in one ledger transaction; returns the ids of all their edits.

        `approval`: the proposal that they carry out, which is decided in the same transaction.
        """
        self._may_commit()
        recorded = self._workspace.ledger.record_patches(
            patches, who, replaced=replaced, restack=restack, approval=approval
        )
        stack = list(self._host.stack)
        first = len(stack) - len(recorded)
        for i, row in enumerate(recorded, first):
            stack[i] = replace(stack[i], patch_id=row.patch_id, position=row.position)
        self._host.stack = tuple(stack)
        self._committed, self._host.began = True, None
        return [edit_id for row in recorded for edit_id in row.edit_ids]

    def commit_reverted(
        self, edit_ids: Sequence[str], who: Who, *, restack: Restack, reason: str | None = None
    ) -> None:
        """Record that these edits were taken back; the staged stack stands."""
        self._may_commit()
        self._workspace.ledger.record_reverted(
            edit_ids,
            self._host.weights_hash,
            who,
            reason=reason,
            restack=restack,
            state_hash=self._workspace.state_hash,
        )
        self._committed, self._host.began = True, None

    def commit_reapplied(
        self,
        measurements: Mapping[str, Mapping[str, Any]],
        edit_ids: Sequence[str],
        who: Who,
        *,
        restack: Restack,
        drift: DriftResult,
        reason: str | None = None,
    ) -> None:
        """Record that these edits are active again; the staged stack stands."""
        self._may_commit()
        self._workspace.ledger.record_reapplied(
            edit_ids,
            self._host.weights_hash,
            who,
            measurements=measurements,
            reason=reason,
            restack=restack,
            state_hash=self._workspace.state_hash,
            drift=vars(drift),
        )
        self._committed, self._host.began = True, None

    def record_rejected(self, patch: NewPatch, failed: Sequence[str], who: Who) -> None:
        """Record an attempt that broke its bounds. The model goes back to its former stack at the end."""
        self._workspace.ledger.record_rejected(patch, failed, who)

    def _may_commit(self) -> None:
        if self._host.open_transactions != 1:
            raise RuntimeError("a transaction inside another one cannot commit")
