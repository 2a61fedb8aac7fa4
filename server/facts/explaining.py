"""Which active edits make the model answer as it does: each is left out, and the answer asked again.

S is a set of edits, a an answer to a prompt x. The effect of S is how much the log-probability of a falls without S,
in nats: effect(S) = log p(a | x, all edits) - log p(a | x, all but S). The answer without S is asked as well. Up to
`SINGLY` edits are left out one by one. More are left out by halves: a half without an effect is put aside whole, one
with an effect is halved again, down to single edits. Edits about what the prompt names come first, so that they are
together. Two edits that each suffice hide each other when one is left out; the whole set is therefore left out first,
and what it changes though no part does is reported as a group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from editors.constants import limit
from editors.model.lm import Prompt
from server.facts.asking_results import EditEffect, Explanation
from server.facts.ids import named
from server.request_context import RequestContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace
from store import EditRecord
from store.canonical import without_case_and_spacing

SINGLY = limit(
    16,
    "active edits up to which explain_answer leaves out each by itself",
    "time: sixteen questions take some seconds on the default model; more edits are left out by halves",
)
MOST_ASKED = limit(
    64,
    "sets of edits that explain_answer leaves out, at most",
    "time: a minute on the default model; groups that were not halved by then are named whole",
)
MOVES = limit(
    0.1,
    "least change of the answer's log-probability, in nats, that counts as an effect of the edits left out",
    "the length of the report: what moves the answer less is named as no effect. It is a tenth of the answer's "
    "probability; edits of other facts move it by thousandths",
)


Item = TypeVar("Item")


@dataclass(frozen=True)
class Without(Generic[Item]):
    """The answer without some edits."""

    edits: list[Item]
    answer: str
    effect: float  # nats; positive: the edits make the answer more probable
    changes: bool

    @property
    def counts(self) -> bool:
        return self.changes or abs(self.effect) >= MOVES


@dataclass
class Search(Generic[Item]):
    """Which edits move an answer; `leave_out` asks without some. `found` has single edits, and groups that act only
    together or could not be taken apart in time."""

    leave_out: Callable[[Sequence[Item]], Without[Item]]
    asked: int = 0
    found: list[Without[Item]] = field(default_factory=list)

    def run(self, edits: Sequence[Item]) -> None:
        if len(edits) <= SINGLY:
            parts = [self._without([edit]) for edit in edits]
            self.found = [part for part in parts if part.counts]
            if len(edits) > 1 and not any(part.changes for part in parts):
                whole = self._without(edits)
                self.found += [whole] if whole.changes else []
            return
        whole = self._without(edits)
        if whole.counts:
            self._take_apart(whole)

    def _take_apart(self, whole: Without[Item]) -> None:
        """Halve the groups that count, the one with the greatest effect first."""
        groups, together = [whole], []
        while groups and self.asked + 2 <= MOST_ASKED:
            group = max(groups, key=lambda g: (g.changes, abs(g.effect)))
            groups.remove(group)
            middle = (len(group.edits) + 1) // 2
            halves = [self._without(group.edits[:middle]), self._without(group.edits[middle:])]
            parts = [half for half in halves if half.counts]
            if group.changes and not any(part.changes for part in parts):
                together.append(group)  # only together do they change it
            self.found += [part for part in parts if len(part.edits) == 1]
            groups += [part for part in parts if len(part.edits) > 1]
        self.found += [*together, *groups]

    def _without(self, edits: Sequence[Item]) -> Without[Item]:
        self.asked += 1
        return self.leave_out(edits)


def explain(
    workspace: Workspace, text: str, chat: bool | None, tokens: int, limit: int, ctx: RequestContext
) -> Explanation:
    """The active edits that move the live model's answer to a prompt, those that change it first.

    The model is bit for bit as before when this returns or raises.
    """
    started = time.monotonic()
    prompt = workspace.lm.prompt(text, chat=chat)
    answer = _say(workspace, prompt, tokens)
    logprob = _logprob(workspace, prompt, answer)
    with workspace.host.pristine():
        base = _say(workspace, prompt, tokens)
    edits = _nearest_first(workspace.active_edits, text)

    whole = workspace.host.stack
    with Transaction(workspace) as tx:

        def leave_out(some: Sequence[EditRecord]) -> Without[EditRecord]:
            ctx.report(0, 1, f"asking without {len(some)} edits")
            tx.stage(without(workspace, some, whole).stack)
            said = _say(workspace, prompt, tokens)
            effect = logprob - _logprob(workspace, prompt, answer)
            return Without(list(some), said, effect, said != answer)

        search = Search(leave_out)
        if edits:
            search.run(edits)
    found = sorted(search.found, key=lambda f: (not f.changes, len(f.edits) > 1, -abs(f.effect)))
    effects = [_effect(each) for each in found[:limit]]
    return Explanation(
        prompt=text,
        answer=answer,
        base_answer=base,
        edited=answer != base,
        effects=effects,
        not_listed=max(0, len(found) - limit),
        active=len(edits),
        asked_without=search.asked,
        seconds=time.monotonic() - started,
        next=_next(found, len(edits), answer != base),
    )


def _say(workspace: Workspace, prompt: Prompt, tokens: int) -> str:
    return workspace.lm.generate([prompt], tokens)[0].text.strip()


def _logprob(workspace: Workspace, prompt: Prompt, answer: str) -> float:
    return workspace.lm.score([(prompt, answer)])[0].logprob if answer else 0.0


def _nearest_first(edits: Sequence[EditRecord], text: str) -> list[EditRecord]:
    """Edits whose subject the prompt names, then the others, the latest first."""
    asked = without_case_and_spacing(text)
    return sorted(edits, key=lambda e: (without_case_and_spacing(e.subject) not in asked, -e.seq))


def _effect(found: Without[EditRecord]) -> EditEffect:
    one = found.edits[0] if len(found.edits) == 1 else None
    return EditEffect(
        edit_ids=named([edit.id for edit in found.edits]),
        fact=f"{one.prompt} -> {one.target}" if one else f"{len(found.edits)} edits that act only together",
        method=one.method if one else ", ".join(sorted({edit.method for edit in found.edits})),
        effect=found.effect,
        changes_answer=found.changes,
        answer_without=found.answer,
    )


def _next(found: Sequence[Without[EditRecord]], active: int, edited: bool) -> str:
    if not active:
        return "No edit is active: this is what the model itself says."
    changing = next((f for f in found if f.changes), None)
    if changing is not None:
        ids = named([edit.id for edit in changing.edits])
        return (
            f"revert_edits({ids!r}) makes it say what `answer_without` says; apply_edits corrects it instead."
        )
    if found:
        return "No edit changes the answer by itself; those listed make it more or less probable."
    return (
        "The edits change this answer only in sum, each by too little to name; audit_edits shows what they moved."
        if edited
        else "No active edit moves this answer: it is the model's own. apply_edits corrects it."
    )
