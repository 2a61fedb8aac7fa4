"""What the ledger knows of the subjects of a call, and the material the edits are made from."""

from __future__ import annotations

from collections.abc import Sequence

from editors.edit import Edit
from editors.forms.filling import span_of
from editors.forms.material import Hold, Material, materials_for
from server.facts.remembered import facts_found_right
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord
from store.canonical import without_case_and_spacing


def collect(
    workspace: Workspace, edits: Sequence[Edit], replaced: Sequence[EditRecord] = (), *, others: bool = True
) -> list[Material]:
    """The material of every edit of a call, made on the model as it is now. `replaced`: edits that are retired.

    Without `others` the model is not asked for other facts of the subjects.
    """
    gone = {record.id for record in replaced}
    active = [record for record in fact_edits(workspace.active_edits) if record.id not in gone]
    right = facts_found_right(workspace)
    known = [[*_edited(edit, active), *_checked(edit, right, active)] for edit in edits]
    return materials_for(workspace.lm, edits, known, others=others)


def _edited(edit: Edit, active: Sequence[EditRecord]) -> list[Hold]:
    """The active edits of the same subject."""
    return [_hold(record) for record in active if _same(record.subject, edit.subject)]


def _checked(edit: Edit, right: Sequence[tuple[str, str]], active: Sequence[EditRecord]) -> list[Hold]:
    """The facts of the same subject that check_facts found right, without those that were edited since."""
    edited = {record.prompt for record in active}
    return [
        Hold(prompt, answer, span, "checked")
        for prompt, answer in right
        if prompt not in edited and (span := span_of(edit.subject, prompt)) is not None
    ]


def _hold(record: EditRecord) -> Hold:
    return Hold(record.prompt, record.target, span_of(record.subject, record.prompt), "ledger")


def _same(subject: str, other: str) -> bool:
    return without_case_and_spacing(subject) == without_case_and_spacing(other)
