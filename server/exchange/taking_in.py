"""One import as one transaction: put the patches on top, measure them and the active edits, judge, keep or not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.edit import Edit
from editors.errors import EditError
from editors.measure import observe
from editors.outcomes import outcomes
from editors.patch import Patch
from server.errors import Conflict, ServiceError
from server.exchange.results import ImportReport
from server.facts.advice import after_import
from server.facts.applying import ledger_request
from server.facts.conflicts import active_conflicts, describe_conflict, refuse_repeated
from server.facts.guard import UNGUARDED, Guard
from server.facts.measuring import Measured, ask_before, edit_of, measure, trained_on
from server.facts.reports import edit_report, measured_values
from server.facts.warnings import failed_bounds
from server.request_context import RequestContext
from server.transaction.transaction import StagedPatch, Transaction
from server.transaction.workspace import STATES_NO_FACT, Workspace, fact_edits, who
from store import EditRecord, NewPatch

MISFITS = (EditError, KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError)
"""Errors that staging a patch can raise if it does not fit the model."""


@dataclass(frozen=True)
class Incoming:
    """One patch to take in, with the edit of each of its rows. Without edits it is one row that states no fact."""

    method: str
    patch: Patch
    data: bytes
    params: Mapping[str, Any]
    edits: Sequence[Edit]
    source: str | None = None

    def requests(self, place: Path) -> list[dict[str, Any]]:
        """What the ledger keeps of each row."""
        if self.edits:
            return [ledger_request(edit) for edit in self.edits]
        name = f"adapter {place.name}"
        row = {"subject": name, "prompt": name, "target": "as it was trained", "source": self.source}
        return [row | {STATES_NO_FACT: True}]


@dataclass(frozen=True)
class Wishes:
    """Options of an import."""

    reason: str | None = None
    guard: Guard | None = None
    dry_run: bool = False

    def check(self, workspace: Workspace) -> None:
        """Raise ReadOnly if the import is to be kept and the server is read-only."""
        if not self.dry_run:
            _ = workspace.writable_model_id


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


AUDITED = 100
"""Active edits, the newest ones, that are asked before and after an import."""


def take_in(workspace: Workspace, coming: Import, wishes: Wishes, ctx: RequestContext) -> ImportReport:
    """Put the patches on top, measure and judge, and record all of them in one ledger transaction, or none.

    Raises ServiceError, EditError or Conflict; then nothing has changed.
    """
    started = time.monotonic()
    edits = coming.edits
    _refuse_conflicts(workspace, coming)
    audited = fact_edits(workspace.active_edits)[-AUDITED:]
    held = _holding(workspace, audited)
    before = ask_before(workspace, edits, ctx, 0.1)
    ids: list[str] = []
    with Transaction(workspace) as tx:
        staged = [_add(tx, coming, incoming) for incoming in coming.patches]
        _refuse_other_result(workspace, coming)
        trained = [t for i in coming.patches for t in trained_on(i.method, i.patch, i.edits, i.params)]
        measured = measure(workspace, before, ctx, trained=trained)
        broken = [record.id for record in held if record not in _holding(workspace, held)]
        failed = failed_bounds(
            wishes.guard or UNGUARDED,
            measured.results,
            measured.drift,
            measured.perplexity_ratio,
            measured.changed,
        )
        if not wishes.dry_run:
            ctx.check()
            records = _records(tx, coming, staged, measured, wishes.reason)
            if failed:
                for record in records:
                    tx.record_rejected(record, failed, who(ctx))
            else:
                ids = tx.commit_applied(records, who(ctx))
    status = "previewed" if wishes.dry_run else "rejected" if failed else "applied"
    return _report(workspace, coming, status, ids, measured, failed, broken, started)


def _holding(workspace: Workspace, records: Sequence[EditRecord]) -> list[EditRecord]:
    """The active edits, of those given, whose own prompts the live model answers with the target."""
    if not records:
        return []
    bare = {"paraphrases": (), "neighbours": (), "portability": ()}
    edits = [edit_of(record).model_copy(update=bare) for record in records]
    seen = observe(workspace.lm, edits)
    asked = outcomes(edits, seen, seen)
    return [record for record, outcome in zip(records, asked, strict=True) if outcome.reliability == 1]


def _refuse_conflicts(workspace: Workspace, coming: Import) -> None:
    for edit in coming.edits:
        workspace.lm.edit_prompt(edit)  # raises InvalidEdit when the subject has no token of its own
    refuse_repeated(coming.edits)
    rows = [row for incoming in coming.patches for row in incoming.requests(coming.path)]
    for old in active_conflicts(workspace, ((row["subject"], row["prompt"]) for row in rows)):
        raise Conflict(f'{describe_conflict(old)}; revert_edits(["{old.id}"]) first, then import again')


def _refuse_other_result(workspace: Workspace, coming: Import) -> None:
    """Raise ServiceError when a bundle does not give the weights that its manifest says."""
    if coming.expected_hash is not None and workspace.host.weights_hash != coming.expected_hash:
        raise ServiceError(
            f"{coming.path.name} gives weights with the hash {workspace.host.weights_hash[:12]}, its manifest says "
            f"{coming.expected_hash[:12]}; it was changed or damaged, and nothing was imported"
        )


def _add(tx: Transaction, coming: Import, incoming: Incoming) -> StagedPatch:
    rows = incoming.requests(coming.path)
    try:
        return tx.add(incoming.method, incoming.patch, len(rows), incoming.data)
    except MISFITS as error:
        raise ServiceError(
            f"{coming.path.name}: the {incoming.patch.kind} patch of {rows[0]['subject']!r} does not fit this "
            f"model ({type(error).__name__}: {error}); nothing was imported"
        ) from error


def _records(
    tx: Transaction, coming: Import, staged: Sequence[StagedPatch], measured: Measured, reason: str | None
) -> list[NewPatch]:
    """What the ledger records of each patch, with the measurements of its own edits."""
    values = iter([measured_values(result) for result in measured.results])
    return [
        tx.describe(
            patch,
            incoming.requests(coming.path),
            incoming.params,
            measurements=[next(values) for _ in incoming.edits],
            drift=measured.drift,
            reason=reason,
            source=incoming.source,
        )
        for incoming, patch in zip(coming.patches, staged, strict=True)
    ]


def _report(
    workspace: Workspace,
    coming: Import,
    status: str,
    ids: list[str],
    measured: Measured,
    failed: list[str],
    broken: list[str],
    started: float,
) -> ImportReport:
    notes = [*coming.notes]
    if broken:
        notes.append(f"active edits that held before do not hold with it: {', '.join(broken[:20])}")
    report = edit_report(
        status=status,
        edit_ids=ids,
        result_ids=ids if coming.edits else [],
        method=", ".join(dict.fromkeys(incoming.method for incoming in coming.patches)),
        params={},
        measured_results=measured.results,
        drift=measured.drift,
        changed=measured.changed,
        perplexity_ratio=measured.perplexity_ratio,
        failed_guard=failed,
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.short_state_hash,
        seconds=time.monotonic() - started,
        notes=notes,
        next_step=after_import(status, measured.results, measured.drift, ids, failed, broken),
    )
    return ImportReport(
        **dict(report),
        imported_from=str(coming.path),
        sha256=coming.sha256,
        original_ids=list(coming.original_ids),
        no_longer_holding=broken,
    )
