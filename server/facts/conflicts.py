"""Edits that cannot be active together: two answers to one question, in one call or with an active edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from editors.edit import PLACEHOLDER, Edit
from editors.forms.filling import span_of
from editors.forms.relations import ask_the_same, template_of
from server.errors import Conflict
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord
from store.canonical import fact_key, without_case_and_spacing


class _ComparedFact(NamedTuple):
    """A fact as it is compared: its subject in one spelling, its prompt with {} for it, its answer."""

    subject: str
    template: str
    answer: str


class Repeated(NamedTuple):
    """Two edits of one call that ask the same, by their indices."""

    first: int
    second: int


def repeated(questions: Iterable[tuple[str, str]]) -> Repeated | None:
    """The first two of some (subject, prompt) that are the same question, or None."""
    seen: dict[str, int] = {}
    for i, (subject, prompt) in enumerate(questions):
        key = fact_key(subject, prompt)
        if key in seen:
            return Repeated(seen[key], i)
        seen[key] = i
    return None


def refuse_repeated(edits: Sequence[Edit]) -> None:
    """Raise Conflict when two edits of one call ask the same question."""
    pair = repeated((edit.subject, edit.text) for edit in edits)
    if pair is None:
        return
    one, other = edits[pair.first], edits[pair.second]
    same = "twice" if one.target == other.target else f"with {one.target!r} and {other.target!r}"
    raise Conflict(f"edits has {other.text!r} {same}; send each fact once")


def active_conflicts(workspace: Workspace, questions: Iterable[tuple[str, str]]) -> list[EditRecord]:
    """The active edits that answer one of these (subject, prompt)."""
    if workspace.model_id is None:
        return []
    return [
        record
        for subject, prompt in questions
        for record in workspace.ledger.find_active(workspace.model_id, subject, prompt)
    ]


@dataclass(frozen=True)
class Contradiction:
    """An edit that asks, in other words, what an active edit or one of the same call answers differently."""

    edit: int  # index in the call
    other: int | None  # index in the call of the earlier one, or
    record: EditRecord | None  # the active edit

    def described(self, edits: Sequence[Edit], ids: Sequence[str]) -> str:
        """One sentence for a report. `ids`: the ids of the edits, where they have any."""

        def name(i: int) -> str:
            return f"{f'{ids[i]} ' if ids else ''}({edits[i].text!r} -> {edits[i].target!r})"

        if self.record is not None:
            active = self.record
            other = f"{active.id} ({active.prompt!r} -> {active.target!r}), which is active"
            advice = f'revert_edits(["{active.id}"]) if it is out of date'
        else:
            assert self.other is not None
            other, advice = name(self.other), "keep one of them"
        return f"{name(self.edit)} seems to contradict {other}: the same fact in other words; {advice}"


def contradictions(
    workspace: Workspace, edits: Sequence[Edit], replaced: Sequence[EditRecord]
) -> list[Contradiction]:
    """Where edits of one subject ask for the same fact in other words and answer it differently.

    The words decide (`ask_the_same`); a relation may have several answers, so this is a warning and no refusal.
    `replaced`: active edits that the call retires.
    """
    gone = {record.id for record in replaced}
    active = [record for record in fact_edits(workspace.active_edits) if record.id not in gone]
    found: list[Contradiction] = []
    for i, edit in enumerate(edits):
        asked = _asked(edit.subject, edit.text, edit.target)
        found += [
            Contradiction(i, None, record)
            for record in active
            if _contradict(asked, _asked(record.subject, record.prompt, record.target))
        ]
        found += [
            Contradiction(i, j, None)
            for j, other in enumerate(edits[:i])
            if _contradict(asked, _asked(other.subject, other.text, other.target))
        ]
    return found


def _asked(subject: str, prompt: str, answer: str) -> _ComparedFact:
    return _ComparedFact(
        without_case_and_spacing(subject), template_of(prompt, span_of(subject, prompt)), answer
    )


def _contradict(one: _ComparedFact, other: _ComparedFact) -> bool:
    return (
        one.subject == other.subject
        and without_case_and_spacing(one.answer) != without_case_and_spacing(other.answer)
        and PLACEHOLDER in one.template
        and PLACEHOLDER in other.template
        and ask_the_same(one.template, other.template)
    )


def describe_conflict(old: EditRecord) -> str:
    """The beginning of a message about an active edit that is in the way."""
    return f"edit {old.id} is active for the same subject and prompt ({old.prompt!r} -> {old.target!r})"
