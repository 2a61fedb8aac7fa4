"""Facts of the set that were right and are now wrong: which edit did it, and what is done about it."""

from __future__ import annotations

from collections.abc import Sequence

from editors.errors import Cancelled, EditError
from server.errors import ServiceError
from server.facts import applying, editing
from server.facts.edit_request import EditRequest
from server.factsets.batches import kept_edits
from server.factsets.checking import ask, ask_again
from server.factsets.phases import CorrectionState
from server.factsets.run import CorrectionRun
from server.jobs.job import JobContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction

MOST_LOST = 64  # lost facts that culprits are looked for


def lost_facts(work: CorrectionRun, progress: CorrectionState) -> list[int]:
    """The facts that were right before the correction, or were corrected, and are not right now."""
    known, outcomes = work.states(), work.outcomes()
    done = [n for n, state in outcomes.items() if state.outcome == "done"]
    wanted = dict.fromkeys([*progress.was_right, *done])
    return [n for n in wanted if n in work.facts and n in known and known[n].verdict != "agrees"]


def mend(work: CorrectionRun, progress: CorrectionState, lost: Sequence[int]) -> None:
    """Name every lost fact with the edit that did it, and act as the policy says."""
    if work.policy.on_damage == "stop":
        _name(work, dict.fromkeys(lost))
        return
    blame = _culprits(work, lost[:MOST_LOST])
    by_edit: dict[int, list[int]] = {}
    for n, culprit in blame.items():
        if culprit is not None:
            by_edit.setdefault(culprit, []).append(n)
    for culprit, damaged in by_edit.items():
        work.job.report(0.92, f"taking back the edit of #{culprit}")
        _take_back(work, culprit, damaged)
    touched = {*lost, *by_edit}
    ask_again(work.workspace, work.job, work.name, {n: work.facts[n] for n in touched})
    still = set(lost_facts(work, progress))
    _give_up(work, [n for n in still if n in lost])
    _name(work, {n: blame.get(n) for n in lost if n in still})


def _culprits(work: CorrectionRun, lost: Sequence[int]) -> dict[int, int | None]:
    """For each lost fact, the corrected fact whose edit did it: without that edit alone it is right again. None if
    there is none.

    The edits of this job are taken out by halves: what one half brings back is looked for within it.
    """
    mine = {n: s.edit_id for n, s in work.outcomes().items() if s.outcome == "done" and s.edit_id is not None}
    blame: dict[int, int | None] = dict.fromkeys(lost)

    def look(candidates: list[int], damaged: list[int]) -> None:
        if not candidates or not damaged:
            return
        back = _brought_back(work, [mine[n] for n in candidates], damaged)
        if len(candidates) == 1:
            blame.update(dict.fromkeys((n for n in back if n != candidates[0]), candidates[0]))
            return
        half = len(candidates) // 2
        look(candidates[:half], back)
        look(candidates[half:], [n for n in back if blame[n] is None])

    look(list(mine), list(lost))
    return blame


def _brought_back(work: CorrectionRun, edit_ids: Sequence[str], lost: Sequence[int]) -> list[int]:
    """The lost facts that are right again without some edits; the model is put back as it was."""
    workspace = work.workspace
    with work.job.live_turn(), Transaction(workspace) as tx:
        tx.stage(without(workspace, workspace.ledger.edits(edit_ids)).stack)
        found = ask(workspace, work.job, {n: work.facts[n] for n in lost})
    return [n for n, check in found.items() if check.verdict == "agrees"]


def _take_back(work: CorrectionRun, culprit: int, damaged: Sequence[int]) -> None:
    """Revert the edit of a fact; with on_damage="retry" try it once more, alone and with the damaged facts held."""
    names = ", ".join(f"#{n}" for n in damaged[:5])
    edit_id = work.states()[culprit].edit_id
    assert edit_id is not None
    ctx = JobContext.of(work.job)
    with work.job.live_turn():
        editing.revert(work.workspace, [edit_id], f"it made {names} of {work.name} wrong", ctx)
        why = f"reverted ({edit_id}): it made {names} wrong"
        work.note({culprit: {"outcome": "failed", "why": why, "edit_id": None}})
        if work.policy.on_damage == "retry":
            _retry(work, culprit, damaged, ctx)


def _retry(work: CorrectionRun, culprit: int, damaged: Sequence[int], ctx: JobContext) -> None:
    policy = work.policy
    held = [(work.facts[n].text, work.facts[n].answer) for n in damaged]
    request = EditRequest(
        [work.facts[culprit].edit(holds=held)],
        policy.method,
        policy.params,
        policy.guard,
        reason=work.reason,
        goal=policy.goal,
    )
    try:
        report = applying.apply(work.workspace, request, ctx)
    except Cancelled:
        raise
    except (EditError, ServiceError) as error:
        work.note({culprit: {"why": f"{work.outcomes()[culprit].why}; tried again: {error}"}})
        return
    kept = kept_edits(work, [culprit], report)
    if not kept:
        return
    found = ask(work.workspace, work.job, {n: work.facts[n] for n in damaged})
    if any(check.verdict != "agrees" for check in found.values()):
        editing.revert(work.workspace, list(kept.values()), "the second try damages it too", ctx)
        return
    why = f"second try, with {', '.join(f'#{n}' for n in damaged[:5])} held"
    work.note({culprit: {"outcome": "done", "why": why, "edit_id": kept[culprit]}})


def _give_up(work: CorrectionRun, numbers: Sequence[int]) -> None:
    """Revert corrections that do not hold at the end: they only change other things."""
    edits = {
        n: s.edit_id for n, s in work.outcomes().items() if n in numbers and s.outcome == "done" and s.edit_id
    }
    if not edits:
        return
    with work.job.live_turn():
        editing.revert(
            work.workspace,
            [*edits.values()],
            "does not hold at the end of " + work.reason,
            JobContext.of(work.job),
        )
        why = "its edit did not hold at the end and was reverted"
        work.note(
            {
                n: {"outcome": "failed", "why": f"{why} ({edit_id})", "edit_id": None}
                for n, edit_id in edits.items()
            }
        )


def _name(work: CorrectionRun, lost: dict[int, int | None]) -> None:
    """Record the facts that stay lost."""
    outcomes = work.outcomes()
    rows: dict[int, dict[str, str | None]] = {}
    for n, culprit in lost.items():
        own = n in outcomes and outcomes[n].outcome == "done"
        by = f"since the edit of #{culprit}" if culprit is not None else "after these edits together"
        rows[n] = {
            "outcome": "failed" if own else "lost",
            "why": "it was corrected and does not hold at the end" if own else f"was right, and is not {by}",
        }
    work.note(rows)
