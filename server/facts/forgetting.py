"""Forget facts: the old answer is not said any more, and nothing is put in its place but "not known".

A fact is forgotten as it is corrected: by an edit whose target is a neutral continuation. What is judged is another
thing: whether the old answer is still said, anywhere in the answer, in wordings that the edit did not learn, after a
hint that does not name it, and after the model is trained on it again for a few steps (lora, on the statement alone,
asked in the other wordings). The last tells what is gone from what is only hidden: a memory beside the weights hides.
Questions of kindred relations that the model answers with the same (where a landmark stands, for its city) are edited
with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from editors import METHODS
from editors.constants import assumed
from editors.edit import Edit, is_question
from editors.errors import EditError
from editors.measure import ANSWER_TOKENS, CHAT_TOKENS
from editors.model.lm import Prompt
from editors.scoring import short_answer
from editors.scoring.words import occurrences, tidy
from editors.steering.stack import unsteered
from server.errors import ServiceError
from server.facts.applying import EditRequest, Previewed, apply_previewed, preview
from server.facts.giving_away import Questions, questions_about
from server.facts.guard import Goal, Guard
from server.facts.ids import ranges
from server.facts.measuring import trained_on
from server.facts.previews import Previews
from server.facts.queries import Forget
from server.facts.results import EditOutcome, EditReport, ForgetReport, Forgotten, StillSaid
from server.methods import checked_params
from server.request_context import RequestContext
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace
from server.wording import counted
from store import fact_key

HINTS = ('(It begins with "{start}".) {prompt}', "As was said before it was changed: {prompt}")
"""Contexts that help to remember without naming the answer."""
START = 2  # letters of the answer that a hint gives away
MOST_CLOSED = 4  # other questions about one fact that are edited with it
MOST_NAMED = 5
RELEARN = "lora"
RELEARN_STEPS = assumed(
    5, "Steps of training on a forgotten fact, to see whether it comes back.", "too few to teach a new fact"
)


@dataclass(frozen=True)
class _Asked:
    """What one fact is judged by, as the model reads it: the prompt of each text, and how long an answer may be."""

    wordings: dict[str, tuple[Prompt, int]]  # not learned
    hints: dict[str, tuple[Prompt, int]]

    def but(self, texts: Collection[str]) -> _Asked:
        """The same without some wordings."""
        return replace(self, wordings={t: row for t, row in self.wordings.items() if t not in texts})


_Answers = dict[str, str]  # by what was asked


@dataclass(frozen=True)
class _Seen:
    """The answers about one fact at three moments; `relearned` is None where that was not tried."""

    before: _Answers
    after: _Answers
    relearned: _Answers | None


@dataclass(frozen=True)
class _Wish:
    """One fact to forget: its edit, the questions around it, and the edits of those that give it away."""

    edit: Edit
    questions: Questions
    closing: list[Edit]


def forget(
    workspace: Workspace,
    facts: Sequence[Forget],
    goal: Goal,
    max_said: float,
    reason: str | None,
    source: str | None,
    ctx: RequestContext,
    previews: Previews[Previewed],
) -> ForgetReport:
    """Suppress facts in one transaction: all of them, or where the old answer is still said, none.

    Raises ServiceError when the model says nothing that could be forgotten, EditError as apply does.
    """
    started = time.monotonic()
    _ = workspace.writable_model_id
    wishes = _each_once([_wish(workspace, fact, i) for i, fact in enumerate(facts)])
    edits = [wish.edit for wish in wishes]
    closing = [edit for wish in wishes for edit in wish.closing]
    request = EditRequest([*edits, *closing], replace=True, goal=goal, guard=Guard(), judged=len(edits))
    report = preview(workspace, request, ctx, previews)
    preview_id = report.preview_id
    kept = previews.get(preview_id)
    results = kept.result.trial.measured.results[: len(edits)]
    asked = [_asked(workspace, wish, result) for wish, result in zip(wishes, results, strict=True)]
    seen, silenced = _tried(workspace, kept, wishes, asked, results, ctx)
    failed = [*report.failed_guard, *_still_said(edits, results, asked, seen, max_said), *_lost(silenced)]
    if not failed:
        wanted = replace(kept.request, reason=reason, source=source, guard=None)
        report = apply_previewed(workspace, kept, wanted, ctx)
    previews.forget(preview_id)
    ids = [] if failed else report.edit_ids
    forgotten = [
        _forgotten(wish.edit, result, asked[i], seen[i], silenced[i])
        for i, (wish, result) in enumerate(zip(wishes, results, strict=True))
    ]
    return _report(workspace, report, _with_ids(forgotten, wishes, ids), failed, started)


def _wish(workspace: Workspace, fact: Forget, index: int) -> _Wish:
    """The edit of a fact, and edits for the questions about it that the model answers with the same."""
    edit = _edit(workspace, fact, index)
    questions = questions_about(edit)
    lm, texts = workspace.lm, [text for kin in questions.kin for text in kin.asked]
    said = lm.generate([lm.prompt(text) for text in texts], [_room(text) for text in texts])
    leaks = {text for text, answer in zip(texts, said, strict=True) if _has(answer.text, edit)}
    given_away = [kin.statement for kin in questions.kin if leaks & set(kin.asked)]
    closing = [
        Edit(
            subject=filled.text[slice(*filled.span)],
            prompt=filled.text,
            target=edit.target,
            previous=edit.previous,
        )
        for filled in given_away[:MOST_CLOSED]
    ]
    return _Wish(edit, questions, closing)


def _each_once(wishes: Sequence[_Wish]) -> list[_Wish]:
    """The same, with no question closed that another fact closes or asks itself."""
    seen = {fact_key(wish.edit.subject, wish.edit.text) for wish in wishes}
    found = []
    for wish in wishes:
        closing = {fact_key(e.subject, e.text): e for e in wish.closing}
        found.append(replace(wish, closing=[e for key, e in closing.items() if key not in seen]))
        seen |= set(closing)
    return found


def _room(text: str) -> int:
    return CHAT_TOKENS if is_question(text) else ANSWER_TOKENS


def _edit(workspace: Workspace, fact: Forget, index: int) -> Edit:
    """The edit that puts the neutral continuation in the place of the answer."""
    try:
        bare = Edit(subject=fact.subject, prompt=fact.prompt, target=fact.instead)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ServiceError(f"facts[{index}]: {problem}") from None
    tokens = CHAT_TOKENS if bare.is_question else ANSWER_TOKENS
    says = workspace.lm.generate([workspace.lm.prompt(bare.text)], tokens)[0].text
    old = fact.answer or short_answer(says)
    if not old.strip():
        raise ServiceError(
            f"facts[{index}]: the model gives no answer to {bare.text!r}; name the one to forget as `answer`"
        )
    if any(True for _ in occurrences(tidy(fact.instead), tidy(old))):
        raise ServiceError(f"facts[{index}].instead {fact.instead!r} says {old!r}, which is to be forgotten")
    return bare.model_copy(update={"previous": old.strip()})


def _asked(workspace: Workspace, wish: _Wish, result: EditOutcome) -> _Asked:
    lm, edit = workspace.lm, wish.edit
    forms = [p for p in result.details if p.kind in ("form", "paraphrase") and not p.trained]
    chats = {form.prompt: form.form.startswith("chat") or is_question(form.prompt) for form in forms}
    chats = {text: is_question(text) for text in wish.questions.asked} | chats
    learned = {edit.text, *(each.text for each in wish.closing)}
    wordings = {
        text: (lm.prompt(text, chat=chat), CHAT_TOKENS if chat else ANSWER_TOKENS)
        for text, chat in chats.items()
        if text not in learned
    }
    start = (edit.previous or "")[:START]
    hinted = [hint.format(start=start, prompt=edit.text) for hint in HINTS]
    return _Asked(wordings, {text: (lm.prompt(text), _room(edit.text)) for text in hinted})


def _tried(
    workspace: Workspace,
    kept: Previewed,
    wishes: Sequence[_Wish],
    asked: Sequence[_Asked],
    results: Sequence[EditOutcome],
    ctx: RequestContext,
) -> tuple[list[_Seen], list[list[str]]]:
    """What the model says before, with the patch, and after a little training on it; and what the patch silences.

    What the preview asked with the patch is not asked again. A memory is not trained on: it is made to hide the fact,
    and the weights beneath still have it.
    """
    trial = kept.result.trial
    before = _said(workspace, asked)
    known = [
        {p.prompt: p.after for p in result.details if p.kind in ("form", "paraphrase")} for result in results
    ]
    relearned: list[_Answers] | None = None
    with Transaction(workspace) as tx:
        tx.retry(kept.plan.base.stack)
        tx.add(trial.editor.name, trial.patch, len(kept.result.rows), trial.staged.data)
        after = _said(workspace, asked, known)
        silenced = [_silenced(workspace, wish) for wish in wishes]
        if trial.editor.exportable:
            relearned = _after_relearning(workspace, tx, [wish.edit for wish in wishes], asked, ctx)
    again: list[_Answers] | list[None] = [None] * len(wishes) if relearned is None else relearned
    return [_Seen(*each) for each in zip(before, after, again, strict=True)], silenced


def _said(workspace: Workspace, asked: Sequence[_Asked], known: Sequence[_Answers] = ()) -> list[_Answers]:
    """What the live model says about each fact; answers that are known are taken as they are."""
    answers = [dict(each) for each in known] or [{} for _ in asked]
    rows = [
        (i, text, *row)
        for i, one in enumerate(asked)
        for text, row in (one.wordings | one.hints).items()
        if text not in answers[i]
    ]
    if rows:
        said = workspace.lm.generate([row[2] for row in rows], [row[3] for row in rows])
        for (i, text, *_), answer in zip(rows, said, strict=True):
            answers[i][text] = answer.text
    return answers


def _silenced(workspace: Workspace, wish: _Wish) -> list[str]:
    """The questions about other things of the subject that a memory would answer as well: with the neutral words."""
    lm, others = workspace.lm, wish.questions.others
    claims = lm.routes.claims([lm.prompt(text) for text in others])
    return [
        text
        for text, claim in zip(others, claims, strict=True)
        if claim is not None and wish.edit.target in claim[1].entry
    ]


def _lost(silenced: Sequence[Sequence[str]]) -> list[str]:
    named = [text for texts in silenced for text in texts]
    if not named:
        return []
    return [
        f"it would silence {counted(len(named), 'question')} about other things too, such as {named[0]!r}"
    ]


def _has(text: str, edit: Edit) -> bool:
    """Whether the old answer stands anywhere in a text: more than "says", for nothing may hint at it."""
    return any(True for _ in occurrences(tidy(text), tidy(edit.previous or "")))


def _share(edit: Edit, texts: Collection[str], answers: _Answers | None) -> float | None:
    """Of some texts, the share whose answer has the old one in it; None where nothing was asked."""
    if not texts or answers is None:
        return None
    return sum(_has(answers[text], edit) for text in texts) / len(texts)


def _after_relearning(
    workspace: Workspace, tx: Transaction, edits: Sequence[Edit], asked: Sequence[_Asked], ctx: RequestContext
) -> list[_Answers] | None:
    """The answers to the other wordings once the statement alone was trained a little; None where it cannot be."""
    editor = METHODS[RELEARN]
    old = [Edit(subject=e.subject, prompt=e.prompt, target=e.previous or "") for e in edits]
    try:
        params = checked_params(editor, workspace.lm, {"max_steps": RELEARN_STEPS})
    except EditError:
        return None
    ctx.report(0.8, 1.0, "training on the forgotten facts, to see whether they come back")
    with unsteered(workspace.lm):
        patch = editor.compute(workspace.lm, old, params, workspace.edit_context(ctx, 0.8, 0.15))
    tx.add(editor.name, patch, len(old))
    trained = trained_on(editor.name, patch, old, params.model_dump(mode="json"))
    others = [one.but(prompts) for one, prompts in zip(asked, trained, strict=True)]
    return _said(workspace, [replace(one, hints={}) for one in others])


def _still_said(
    edits: Sequence[Edit],
    results: Sequence[EditOutcome],
    asked: Sequence[_Asked],
    seen: Sequence[_Seen],
    max_said: float,
) -> list[str]:
    """The facts whose old answer is still said, in their own prompt or in too many wordings."""
    failed = []
    for i, (edit, result) in enumerate(zip(edits, results, strict=True)):
        share = _share(edit, asked[i].wordings, seen[i].after)
        if _has(result.after, edit):
            failed.append(f"{edit.text!r} is still answered with {edit.previous!r}")
        elif share is not None and share > max_said:
            named = next(text for text in asked[i].wordings if _has(seen[i].after[text], edit))
            failed.append(
                f"max_said {max_said:g}: {edit.previous!r} in {share:.2f} of the other wordings of {edit.text!r}, "
                f"{named!r} among them"
            )
    return failed


def _forgotten(edit: Edit, result: EditOutcome, asked: _Asked, seen: _Seen, silenced: list[str]) -> Forgotten:
    said = [text for text in asked.wordings if _has(seen.after[text], edit)]
    own = _has(result.after, edit)
    relearned = seen.relearned and [text for text in asked.wordings if text in seen.relearned]
    return Forgotten(
        subject=edit.subject,
        prompt=edit.text,
        answer=edit.previous or "",
        before=result.before,
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


def _with_ids(forgotten: Sequence[Forgotten], wishes: Sequence[_Wish], ids: Sequence[str]) -> list[Forgotten]:
    """With the ids of the facts' own edits, which come first, and of those that close other ways to them."""
    if not ids:
        return list(forgotten)
    found, at = [], len(wishes)
    for i, (each, wish) in enumerate(zip(forgotten, wishes, strict=True)):
        also = list(ids[at : at + len(wish.closing)])
        at += len(also)
        found.append(each.model_copy(update={"edit_id": ids[i], "also_edited": also}))
    return found


def _report(
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
    """Whether the fact is said in its own prompt, which no max_said allows."""
    return any(True for _ in occurrences(tidy(each.after), tidy(each.answer)))
