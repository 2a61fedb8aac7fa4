"""Edits that cannot be active together: two answers to one question, in one call or with an active edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from editors.edit import Edit
from server.errors import Conflict
from server.transaction.workspace import Workspace
from store import EditRecord
from store.canonical import fact_key


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


def describe_conflict(old: EditRecord) -> str:
    """The beginning of a message about an active edit that is in the way."""
    return f"edit {old.id} is active for the same subject and prompt ({old.prompt!r} -> {old.target!r})"
