"""What is asked about facts to forget, and the report: what is still said, and what to do next."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from editors import METHODS
from editors.edit import Edit
from editors.model.lm import Prompt
from editors.scoring.words import occurrences, tidy
from server.facts.forgetting_results import ForgetReport, Forgotten, StillSaid
from server.facts.giving_away import Questions
from server.facts.ids import ranges
from server.facts.results import EditOutcome, EditReport
from server.transaction.workspace import Workspace
from server.wording import counted

MOST_NAMED = 5


@dataclass(frozen=True)
class WordingsAsked:
    """What one fact is judged by, as the model reads it: the prompt of each text, and how long an answer may be."""

    wordings: dict[str, tuple[Prompt, int]]  # not learned
    hints: dict[str, tuple[Prompt, int]]

    def but(self, texts: Collection[str]) -> WordingsAsked:
        """The same without some wordings."""
        return replace(self, wordings={t: row for t, row in self.wordings.items() if t not in texts})


AnswersByText = dict[str, str]  # by what was asked


@dataclass(frozen=True)
class AnswersSeen:
    """The answers about one fact at three moments; `relearned` is None where that was not tried."""

    before: AnswersByText
    after: AnswersByText
    relearned: AnswersByText | None


@dataclass(frozen=True)
class ToForget:
    """One fact to forget: its edit, the questions around it, and the edits of those that give it away."""

    edit: Edit
    questions: Questions
    closing: list[Edit]
    said: str  # what the model answers now, which an active edit may have taught it


def still_has(text: str, edit: Edit) -> bool:
    """Whether the old answer stands anywhere in a text. This is stricter than `says`: nothing may hint at it."""
    return any(True for _ in occurrences(tidy(text), tidy(edit.previous or "")))


def _share(edit: Edit, texts: Collection[str], answers: AnswersByText | None) -> float | None:
    """The share of texts whose answer contains the old one; None if nothing was asked."""
    if not texts or answers is None:
        return None
    return sum(still_has(answers[text], edit) for text in texts) / len(texts)


def sentences_still_said(
    edits: Sequence[Edit],
    results: Sequence[EditOutcome],
    asked: Sequence[WordingsAsked],
    seen: Sequence[AnswersSeen],
    max_said: float,
) -> list[str]:
    """The facts whose old answer is still said, in their own prompt or in too many wordings."""
    failed = []
    for i, (edit, result) in enumerate(zip(edits, results, strict=True)):
        share = _share(edit, asked[i].wordings, seen[i].after)
        if still_has(result.after, edit):
            failed.append(f"{edit.text!r} is still answered with {edit.previous!r}")
        elif share is not None and share > max_said:
            named = next(text for text in asked[i].wordings if still_has(seen[i].after[text], edit))
            failed.append(
                f"max_said {max_said:g}: {edit.previous!r} in {share:.2f} of the other wordings of {edit.text!r}, "
                f"{named!r} among them"
            )
    return failed


def one_forgotten(
    wish: ToForget, result: EditOutcome, asked: WordingsAsked, seen: AnswersSeen, silenced: list[str]
) -> Forgotten:
    edit = wish.edit
    said = [text for text in asked.wordings if still_has(seen.after[text], edit)]
    own = still_has(result.after, edit)
    relearned = seen.relearned and [text for text in asked.wordings if text in seen.relearned]
    return Forgotten(
        subject=edit.subject,
        prompt=edit.text,
        answer=edit.previous or "",
        before=wish.said,
        after=result.after,
        suppressed=False if own or said else True if asked.wordings else None,
        asked=len(asked.wordings),
        still_said=[StillSaid(prompt=text, answer=seen.after[text].strip()) for text in said[:MOST_NAMED]],
        silenced=silenced[:MOST_NAMED],
        said_before=_share(edit, asked.wordings, seen.before),
        said_after=_share(edit, asked.wordings, seen.after),
        said_with_hint=_share(edit, asked.hints, seen.after),
        said_with_hint_before=_share(edit, asked.hints, seen.before),
        said_after_relearning=_share(edit, relearned or (), seen.relearned),
        locality=result.locality,
        subject_locality=result.subject_locality,
    )


def with_edit_ids(
    forgotten: Sequence[Forgotten], wishes: Sequence[ToForget], ids: Sequence[str]
) -> list[Forgotten]:
    """With the ids of the facts' own edits, which come first, and of the edits for other questions that give the
    facts away."""
    if not ids:
        return list(forgotten)
    found, at = [], len(wishes)
    for i, (each, wish) in enumerate(zip(forgotten, wishes, strict=True)):
        also = list(ids[at : at + len(wish.closing)])
        at += len(also)
        found.append(each.model_copy(update={"edit_id": ids[i], "also_edited": also}))
    return found


def forget_report(
    workspace: Workspace,
    report: EditReport,
    forgotten: list[Forgotten],
    failed: list[str],
    started: float,
) -> ForgetReport:
    beside = METHODS[report.method].kind != "weight"
    whole = all(each.suppressed for each in forgotten)
    return ForgetReport(
        status="rejected" if failed else "suppressed" if whole else "partly",
        summary=_summary(forgotten),
        edit_ids=report.edit_ids if not failed else [],
        method=report.method,
        facts=forgotten,
        failed=failed,
        changed=report.changed,
        changed_count=report.changed_count,
        perplexity_ratio=report.perplexity_ratio,
        hidden=beside,
        note="A memory hides the answers; the weights beneath still have them." if beside else "",
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.short_state_hash,
        seconds=time.monotonic() - started,
        next=_next(report, forgotten, failed, beside),
    )


def _summary(forgotten: Sequence[Forgotten]) -> str:
    """Counts of what was measured, and of what was not."""
    gone = sum(each.suppressed is True for each in forgotten)
    said = sum(each.suppressed is False for each in forgotten)
    asked = sum(each.asked for each in forgotten)
    parts = [
        f"{gone} of {counted(len(forgotten), 'fact')} not said in any of {counted(asked, 'other wording')}"
    ]
    if said:
        parts.append(f"{said} still said in some")
    if unknown := len(forgotten) - gone - said:
        parts.append(f"{unknown} asked in its own words alone, for no other wording is known")
    return "; ".join(parts) + "."


def _next(report: EditReport, forgotten: Sequence[Forgotten], failed: Sequence[str], beside: bool) -> str:
    """What can be done about a failure, or to take it back."""
    if not failed:
        listed = ", ".join(f'"{each}"' for each in ranges(report.edit_ids))
        return f"revert_edits([{listed}]) brings the answers back exactly."
    ways = ['goal="export" tries the weights'] if beside else []
    if any(each.still_said for each in forgotten) and not any(_is_own(each) for each in forgotten):
        worst = max(each.said_after or 0.0 for each in forgotten)
        ways.append(f"max_said={math.ceil(100 * worst) / 100:g} keeps it as it is, said in those wordings")
    ways.append("other words in `prompt` may fit better")
    return f"Nothing was changed. {'; '.join(ways)}."


def _is_own(each: Forgotten) -> bool:
    """Whether the fact is said in its own prompt, which is never allowed."""
    return any(True for _ in occurrences(tidy(each.after), tidy(each.answer)))
