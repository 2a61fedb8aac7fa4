"""Forget facts: the old answer is not said any more, and nothing is put in its place but "not known".

A fact is forgotten as it is corrected: by an edit whose target is a neutral continuation. What is judged is
whether the old answer is still said anywhere in an answer:
- in wordings that the edit did not learn;
- after a hint that does not name it;
- after the model is trained on it again for a few steps (lora, on the statement alone; asked in the other wordings).
  This tells a fact that is gone from one that is only hidden: a memory beside the weights hides it.
Some questions of other relations have the same answer (in which city does a landmark stand; where is it). They are
edited too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pydantic import ValidationError

from editors import METHODS
from editors.constants import assumed
from editors.edit import Edit, is_question
from editors.errors import EditError
from editors.measure import ANSWER_TOKENS, CHAT_TOKENS
from editors.scoring import short_answer
from editors.scoring.words import occurrences, tidy
from editors.steering.stack import unsteered
from server.errors import ServiceError
from server.facts.applying import Previewed, apply_previewed, preview
from server.facts.edit_request import EditRequest
from server.facts.forgetting_report import (
    AnswersByText,
    AnswersSeen,
    ToForget,
    WordingsAsked,
    forget_report,
    one_forgotten,
    sentences_still_said,
    still_has,
    with_edit_ids,
)
from server.facts.forgetting_results import ForgetReport
from server.facts.giving_away import questions_about
from server.facts.guard import Goal, Guard
from server.facts.measuring import trained_on
from server.facts.previews import Previews
from server.facts.queries import Forget
from server.facts.results import EditOutcome
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
RELEARN = "lora"
RELEARN_STEPS = assumed(
    5, "Steps of training on a forgotten fact, to see whether it comes back.", "too few to teach a new fact"
)


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
    failed = [
        *report.failed_guard,
        *sentences_still_said(edits, results, asked, seen, max_said),
        *_lost(silenced),
    ]
    if not failed:
        wanted = replace(kept.request, reason=reason, source=source, guard=None)
        report = apply_previewed(workspace, kept, wanted, ctx)
    previews.forget(preview_id)
    ids = [] if failed else report.edit_ids
    forgotten = [
        one_forgotten(wish, result, asked[i], seen[i], silenced[i])
        for i, (wish, result) in enumerate(zip(wishes, results, strict=True))
    ]
    return forget_report(workspace, report, with_edit_ids(forgotten, wishes, ids), failed, started)


def _wish(workspace: Workspace, fact: Forget, index: int) -> ToForget:
    """The edit of a fact, and edits for other questions that the model answers with the same answer."""
    edit, says = _edit(workspace, fact, index)
    questions = questions_about(edit)
    lm, texts = workspace.lm, [text for kin in questions.kin for text in kin.asked]
    said = lm.generate([lm.prompt(text) for text in texts], [_room(text) for text in texts])
    leaks = {text for text, answer in zip(texts, said, strict=True) if still_has(answer.text, edit)}
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
    return ToForget(edit, questions, closing, says)


def _each_once(wishes: Sequence[ToForget]) -> list[ToForget]:
    """The same, without edits for questions that another fact edits or asks."""
    seen = {fact_key(wish.edit.subject, wish.edit.text) for wish in wishes}
    found = []
    for wish in wishes:
        closing = {fact_key(e.subject, e.text): e for e in wish.closing}
        found.append(replace(wish, closing=[e for key, e in closing.items() if key not in seen]))
        seen |= set(closing)
    return found


def _room(text: str) -> int:
    return CHAT_TOKENS if is_question(text) else ANSWER_TOKENS


def _edit(workspace: Workspace, fact: Forget, index: int) -> tuple[Edit, str]:
    """The edit that replaces the answer by the neutral continuation, and what the model says now."""
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
            f"facts[{index}]: the model gives no answer to {bare.text!r}; give the answer to forget as `answer`"
        )
    if any(True for _ in occurrences(tidy(fact.instead), tidy(old))):
        raise ServiceError(f"facts[{index}].instead {fact.instead!r} says {old!r}, which is to be forgotten")
    return bare.model_copy(update={"previous": old.strip()}), says.strip()


def _asked(workspace: Workspace, wish: ToForget, result: EditOutcome) -> WordingsAsked:
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
    return WordingsAsked(wordings, {text: (lm.prompt(text), _room(edit.text)) for text in hinted})


def _tried(
    workspace: Workspace,
    kept: Previewed,
    wishes: Sequence[ToForget],
    asked: Sequence[WordingsAsked],
    results: Sequence[EditOutcome],
    ctx: RequestContext,
) -> tuple[list[AnswersSeen], list[list[str]]]:
    """The model's answers before, with the patch, and after a little training on the facts; and which other
    questions the patch silences.

    What the preview asked with the patch is not asked again. A memory is not trained on: it is made to hide the fact,
    and the weights beneath still have it.
    """
    trial = kept.result.trial
    before = _said(workspace, asked)
    known = [
        {p.prompt: p.after for p in result.details if p.kind in ("form", "paraphrase")} for result in results
    ]
    relearned: list[AnswersByText] | None = None
    with Transaction(workspace) as tx:
        tx.retry(kept.plan.base.stack)
        tx.add(trial.editor.name, trial.patch, len(kept.result.rows), trial.staged.data)
        after = _said(workspace, asked, known)
        silenced = [_silenced(workspace, wish) for wish in wishes]
        if trial.editor.exportable:
            relearned = _after_relearning(workspace, tx, [wish.edit for wish in wishes], asked, ctx)
    again: list[AnswersByText] | list[None] = [None] * len(wishes) if relearned is None else relearned
    return [AnswersSeen(*each) for each in zip(before, after, again, strict=True)], silenced


def _said(
    workspace: Workspace, asked: Sequence[WordingsAsked], known: Sequence[AnswersByText] = ()
) -> list[AnswersByText]:
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


def _silenced(workspace: Workspace, wish: ToForget) -> list[str]:
    """The questions about other things of the subject that a memory would answer too, with the neutral words."""
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


def _after_relearning(
    workspace: Workspace,
    tx: Transaction,
    edits: Sequence[Edit],
    asked: Sequence[WordingsAsked],
    ctx: RequestContext,
) -> list[AnswersByText] | None:
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
