"""The old patches are tried as they are, and kept where their edits still hold and nothing is damaged.

Some patches are put on the model together, in one transaction; where that breaks a bound, without the edits that do not
hold, and then each patch alone. What is judged, and by which bounds, is what a new edit is judged by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from editors.edit import Edit
from editors.errors import Cancelled, EditError
from editors.finetune.peft_format import shape_of
from editors.memory.fact_memory import InContextPatch
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, save
from editors.patch_kinds import load
from server.errors import ServiceError
from server.facts.measuring import Before, Measured, ask_before, measure, trained_on
from server.facts.rates import mean_forms
from server.facts.reports import measured_values
from server.facts.results import EditOutcome
from server.facts.trials import are_weak
from server.facts.warnings import failed_bounds, missed
from server.jobs.job import JobContext, Stopped
from server.methods import editor_named
from server.rebase.run import RebaseRun, request_of
from server.rebase.state import LINK, TO_DO
from server.transaction.transaction import Transaction
from server.transaction.workspace import who
from store import EditRecord, PatchRecord
from store.errors import BlobError

TOGETHER = 10  # edits whose old patches are tried in one transaction
MISFITS = (EditError, KeyError, AttributeError, IndexError, TypeError, ValueError, RuntimeError)
"""Errors that a patch of another base can raise when it is put on this model, or when the model is asked with it."""


@dataclass(frozen=True)
class OldPatch:
    """One patch of the old base with the edits that it is to carry, by row."""

    about: PatchRecord
    records: Sequence[EditRecord]
    patch: Patch
    whole: Patch  # as it was computed, for all edits of its call

    @property
    def edits(self) -> list[Edit]:
        return [request_of(record) for record in self.records]

    def only(self, work: RebaseRun, records: Sequence[EditRecord]) -> OldPatch | None:
        """The same for some of its edits; None where there are none, or its method cannot divide it."""
        if not records:
            return None
        try:
            rows = [record.row for record in records]
            some = editor_named(self.about.method).subset(self.whole, rows, work.workspace.statistics)
        except (*MISFITS, ServiceError):
            return None
        return OldPatch(self.about, records, some, self.whole)


def keep_old(work: RebaseRun, *, dry: bool = False) -> None:
    """Try the old patches of all facts that are to do. With `dry` what holds is noted, and nothing is kept."""
    groups = {n: rs for n, rs in work.by_patch(TO_DO).items() if n not in work.state.tried}
    done, total = 0, sum(map(len, groups.values()))
    for numbers in _batches(groups):
        found = [old for n in numbers if (old := _read(work, groups[n])) is not None]
        work.job.report(0.2 + 0.2 * done / total, f"trying the old patches, {done} of {total} edits")
        if found:
            _keep(work, found, dry)
        done += sum(len(groups[n]) for n in numbers)
        work.state.tried += numbers
        work.save()


def _batches(groups: dict[int, list[EditRecord]]) -> Iterable[list[int]]:
    """Numbers of patches in order, some together that have about so many edits."""
    batch: list[int] = []
    count = 0
    for number, records in groups.items():
        if batch and count + len(records) > TOGETHER:
            yield batch
            batch, count = [], 0
        batch.append(number)
        count += len(records)
    if batch:
        yield batch


def _read(work: RebaseRun, records: Sequence[EditRecord]) -> OldPatch | None:
    """The patch that carries these edits; None where it does not fit this model, or cannot be read or divided."""
    ledger = work.workspace.ledger
    about = ledger.get_patch(records[0].patch_id)
    try:
        whole = load(ledger.patch_bytes(about.source_blob))
    except (BlobError, EditError):
        return None
    if not fits(work.workspace.lm, whole):
        return None
    old = OldPatch(about, records, whole, whole)
    return old if len(records) == len(ledger.batch(about.id)) else old.only(work, records)


def fits(lm: LM, patch: Patch) -> bool:
    """Whether a patch can be put on this model: its weights are there in its shapes, its states are as wide.

    Of other memories it is found out by putting them on.
    """
    if isinstance(patch, InContextPatch):
        return patch.embeddings.shape[-1] == lm.d_model
    if not isinstance(patch, WeightPatch):
        return True
    try:
        return all(lm.shape(name) == shape_of(delta) for name, delta in patch.deltas.items())
    except (AttributeError, EditError):
        return False


def _keep(work: RebaseRun, old: Sequence[OldPatch], dry: bool) -> None:
    """Keep patches together, or those of their edits that hold, or each alone."""
    with work.job.live_turn():
        try:
            failing = _attempt(work, old, dry)
        except (Cancelled, Stopped):
            raise
        except (*MISFITS, ServiceError):
            failing = {}
    if failing is None:
        return
    if failing:
        smaller = [o.only(work, [r for r in o.records if r.id not in failing]) for o in old]
        if left := [each for each in smaller if each is not None]:
            _keep(work, left, dry)
    elif len(old) > 1:
        for each in old:
            _keep(work, [each], dry)


def keep_though_weak(work: RebaseRun, record: EditRecord) -> bool:
    """Keep an old patch that holds in fewer wordings than on its own base, where nothing better was found."""
    if record.id not in work.state.weak or (old := _read(work, [record])) is None:
        return False
    with work.job.live_turn():
        try:
            return _attempt(work, [old], dry=False, weak_too=True) is None
        except (Cancelled, Stopped):
            raise
        except (*MISFITS, ServiceError):
            return False


def _attempt(
    work: RebaseRun, old: Sequence[OldPatch], dry: bool, weak_too: bool = False
) -> dict[str, str] | None:
    """One transaction: None where its edits are kept, or with `dry` would be; else the old ids that do not hold.

    They are none where only a bound of all of them together is broken. `weak_too`: few wordings do not matter.
    """
    workspace, ctx = work.workspace, JobContext.of(work.job, 0.2, 0.4, "trying old patches")
    edits = [edit for each in old for edit in each.edits]
    records = [record for each in old for record in each.records]
    before = ask_before(workspace, edits, ctx, 0.0)
    with Transaction(workspace) as tx:
        staged = [tx.add(o.about.method, o.patch, len(o.records), save(o.patch)) for o in old]
        trained = [t for o in old for t in trained_on(o.about.method, o.patch, o.edits, o.about.params)]
        measured = measure(workspace, before, ctx, trained=trained)
        failing, broken = _judged(work, records, before, measured)
        weak = [] if weak_too else _weak(work, records, measured.results)
        if failing or broken or weak:
            work.state.weak += [old_id for old_id in weak if old_id not in failing]
            return failing | dict.fromkeys(weak, "it holds in fewer wordings than on its own base")
        ids: list[str | None] = [None] * len(records)
        if not dry:
            ctx.check()
            values = iter([measured_values(result) for result in measured.results])
            patches = [
                tx.describe(
                    patch,
                    [_kept_request(record) for record in each.records],
                    each.about.params,
                    measurements=[next(values) for _ in each.records],
                    drift=measured.drift,
                    reason=work.reason,
                )
                for each, patch in zip(old, staged, strict=True)
            ]
            ids = [*tx.commit_applied(patches, who(ctx))]
    for record, edit_id in zip(records, ids, strict=True):
        work.state.note(record.id, "kept", edit_id)
    work.state.rates.append(work.rated(measured.results))
    work.save()
    return None


def _judged(
    work: RebaseRun, records: Sequence[EditRecord], before: Before, measured: Measured
) -> tuple[dict[str, str], list[str]]:
    """The old ids of edits that do not hold, with the reason; and the bounds that are broken."""
    results = measured.results
    guard = work.guard(len(records), len(before.watched))
    holds = {hold.prompt for record in records for hold in request_of(record).holds}
    broken = failed_bounds(
        guard, results, measured.drift, measured.perplexity_ratio, measured.changed, frozenset(holds)
    )
    failing = {
        r.id: f"the model says {o.after!r}"
        for r, o in zip(records, results, strict=True)
        if o.reliability < 1
    }
    return failing | {records[i].id: why for i, why in missed(results, guard).items()}, broken


def _weak(work: RebaseRun, records: Sequence[EditRecord], results: Sequence[EditOutcome]) -> list[str]:
    """The old ids of edits that hold in too few wordings here, and did not on their own base."""
    return [
        record.id
        for record, result in zip(records, results, strict=True)
        if are_weak(mean_forms([result])) and not are_weak(_forms_then(work, record))
    ]


def _forms_then(work: RebaseRun, record: EditRecord) -> dict[str, float]:
    """In which share of each form an old edit held on its own base, as it was asked last."""
    for measurement in reversed(work.workspace.ledger.measurements_of(record.id)):
        if forms := measurement.values.get("forms"):
            return dict(forms)
    return {}


def _kept_request(record: EditRecord) -> dict[str, Any]:
    link = {"from": record.id, "how": "kept"}
    return {**record.request, "reason": record.reason, "source": record.source, LINK: link}
