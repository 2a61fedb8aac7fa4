"""Forget facts: the old answer is not said any more, and nothing is put in its place but "not known".

A fact is forgotten as it is corrected: by an edit whose target is a neutral continuation. What is judged is another
thing: whether the old answer is still said, anywhere in the answer, in wordings that the edit did not learn, after a
hint that does not name it, and after the model is trained on it again for a few steps (lora, on the statement alone,
asked in the other wordings). The last tells what is gone from what is only hidden: a memory beside the weights hides.
"""

from __future__ import annotations

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
from server.facts.guard import Goal, Guard
from server.facts.measuring import trained_on
from server.facts.previews import Previews
from server.facts.queries import Forget
from server.facts.results import EditOutcome, EditReport, ForgetReport, Forgotten
from server.methods import checked_params
from server.request_context import RequestContext
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace

HINTS = ('(It begins with "{start}".) {prompt}', "As was said before it was changed: {prompt}")
"""Contexts that help to remember without naming the answer."""
START = 2  # letters of the answer that a hint gives away
RELEARN = "lora"
RELEARN_STEPS = assumed(
    5, "Steps of training on a forgotten fact, to see whether it comes back.", "too few to teach a new fact"
)


@dataclass(frozen=True)
class _Asked:
    """What one fact is judged by: wordings that were not learned, and hints, as the model reads them."""

    wordings: dict[
        str, tuple[Prompt, int]
    ]  # by their text: what the model reads, and how long the answer may be
    hints: list[tuple[Prompt, int]]

    def but(self, texts: Collection[str]) -> _Asked:
        """The same without some wordings."""
        return replace(self, wordings={t: row for t, row in self.wordings.items() if t not in texts})


@dataclass(frozen=True)
class _Said:
    """Share of answers that have the old answer in them, of each fact; None where nothing could be asked."""

    wordings: list[float | None]
    hints: list[float | None]


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
    edits = [_edit(workspace, fact, i) for i, fact in enumerate(facts)]
    request = EditRequest(edits, replace=True, goal=goal, guard=Guard())
    report = preview(workspace, request, ctx, previews)
    kept = previews.get(report.preview_id)
    results = kept.result.trial.measured.results
    asked = [_asked(workspace, edit, result) for edit, result in zip(edits, results, strict=True)]
    was = _said(workspace, edits, asked)
    with Transaction(workspace) as tx:
        trial = kept.result.trial
        tx.retry(kept.plan.base.stack)
        tx.add(trial.editor.name, trial.patch, len(edits), trial.staged.data)
        now = _said(workspace, edits, asked)
        relearned = _after_relearning(workspace, tx, edits, asked, ctx)
    failed = [*report.failed_guard, *_still_said(edits, results, now, max_said)]
    if not failed:
        wanted = replace(kept.request, reason=reason, source=source, guard=None)
        report = apply_previewed(workspace, kept, wanted, ctx)
    previews.forget(report.preview_id)
    ids = [None] * len(edits) if failed else report.edit_ids
    forgotten = [
        _forgotten(edit, result.model_copy(update={"edit_id": edit_id}), was, now, relearned, i)
        for i, (edit, result, edit_id) in enumerate(zip(edits, results, ids, strict=True))
    ]
    return _report(workspace, report, forgotten, failed, started)


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


def _asked(workspace: Workspace, edit: Edit, result: EditOutcome) -> _Asked:
    lm = workspace.lm
    forms = [p for p in result.details if p.kind in ("form", "paraphrase") and not p.trained]
    wordings = {}
    for form in forms:
        chat = form.form.startswith("chat") or is_question(form.prompt)
        wordings[form.prompt] = lm.prompt(form.prompt, chat=chat), CHAT_TOKENS if chat else ANSWER_TOKENS
    start = (edit.previous or "")[:START]
    hinted = [hint.format(start=start, prompt=edit.text) for hint in HINTS]
    tokens = CHAT_TOKENS if edit.is_question else ANSWER_TOKENS
    return _Asked(wordings, [(lm.prompt(text), tokens) for text in hinted])


def _said(workspace: Workspace, edits: Sequence[Edit], asked: Sequence[_Asked]) -> _Said:
    """How often the live model says the old answers."""
    rows = [each for one in asked for each in (*one.wordings.values(), *one.hints)]
    if not rows:
        return _Said([None] * len(edits), [None] * len(edits))
    said = iter(workspace.lm.generate([prompt for prompt, _ in rows], [tokens for _, tokens in rows]))
    wordings, hints = [], []
    for edit, one in zip(edits, asked, strict=True):
        wordings.append(_share([_has(next(said).text, edit) for _ in one.wordings]))
        hints.append(_share([_has(next(said).text, edit) for _ in one.hints]))
    return _Said(wordings, hints)


def _has(text: str, edit: Edit) -> bool:
    """Whether the old answer stands anywhere in a text: more than "says", for nothing may hint at it."""
    return any(True for _ in occurrences(tidy(text), tidy(edit.previous or "")))


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _after_relearning(
    workspace: Workspace, tx: Transaction, edits: Sequence[Edit], asked: Sequence[_Asked], ctx: RequestContext
) -> list[float | None]:
    """The share in the other wordings once the statement alone was trained a little; None where it cannot be."""
    editor = METHODS[RELEARN]
    old = [Edit(subject=e.subject, prompt=e.prompt, target=e.previous or "") for e in edits]
    try:
        params = checked_params(editor, workspace.lm, {"max_steps": RELEARN_STEPS})
    except EditError:
        params = None
    if params is None:
        return [None] * len(edits)
    ctx.report(0.8, 1.0, "training on the forgotten facts, to see whether they come back")
    with unsteered(workspace.lm):
        patch = editor.compute(workspace.lm, old, params, workspace.edit_context(ctx, 0.8, 0.15))
    tx.add(editor.name, patch, len(old))
    trained = trained_on(editor.name, patch, old, params.model_dump(mode="json"))
    others = [one.but(prompts) for one, prompts in zip(asked, trained, strict=True)]
    return _said(workspace, edits, others).wordings


def _still_said(
    edits: Sequence[Edit], results: Sequence[EditOutcome], now: _Said, max_said: float
) -> list[str]:
    """The facts whose old answer is still said, in their own prompt or in too many wordings."""
    failed = []
    for edit, result, share in zip(edits, results, now.wordings, strict=True):
        if _has(result.after, edit):
            failed.append(f"{edit.text!r} is still answered with {edit.previous!r}")
        elif share is not None and share > max_said:
            failed.append(
                f"max_said {max_said:g}: {edit.previous!r} in {share:.2f} of the wordings of {edit.text!r}"
            )
    return failed


def _forgotten(
    edit: Edit, result: EditOutcome, was: _Said, now: _Said, relearned: Sequence[float | None], i: int
) -> Forgotten:
    return Forgotten(
        edit_id=result.edit_id,
        subject=edit.subject,
        prompt=edit.text,
        answer=edit.previous or "",
        before=result.before,
        after=result.after,
        suppressed=not _has(result.after, edit) and not now.wordings[i],
        said_before=was.wordings[i],
        said_after=now.wordings[i],
        said_with_hint=now.hints[i],
        said_with_hint_before=was.hints[i],
        said_after_relearning=relearned[i],
        locality=result.locality,
        subject_locality=result.subject_locality,
    )


def _report(
    workspace: Workspace,
    report: EditReport,
    forgotten: list[Forgotten],
    failed: list[str],
    started: float,
) -> ForgetReport:
    beside = METHODS[report.method].kind != "weight"
    count = sum(each.suppressed for each in forgotten)
    if failed:
        steps = "Nothing was changed. goal='export' tries the weights, max_said allows some wordings."
    else:
        steps = f"revert_edits({report.edit_ids!r}) brings the answers back exactly."
    return ForgetReport(
        status="rejected" if failed else "suppressed",
        summary=f"{count} of {len(forgotten)} facts are suppressed.",
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
        next=steps,
    )
