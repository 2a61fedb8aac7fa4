"""What the ledger knows of the subjects of a call, and the material the edits are made from."""

from __future__ import annotations

from collections.abc import Sequence

from editors.edit import Edit, find_subject
from editors.forms.material import Hold, Material, materials_for
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord
from store.canonical import without_case_and_spacing


def collect(
    workspace: Workspace, edits: Sequence[Edit], replaced: Sequence[EditRecord] = ()
) -> list[Material]:
    """The material of every edit of a call, made on the model as it is now. `replaced`: edits that are retired."""
    gone = {record.id for record in replaced}
    active = [record for record in fact_edits(workspace.active_edits) if record.id not in gone]
    known = [[_hold(record) for record in active if _same(record.subject, edit.subject)] for edit in edits]
    return materials_for(workspace.lm, edits, known)


def _hold(record: EditRecord) -> Hold:
    start = find_subject(record.prompt, record.subject)
    return Hold(record.prompt, record.target, (start, start + len(record.subject)), "ledger")


def _same(subject: str, other: str) -> bool:
    return without_case_and_spacing(subject) == without_case_and_spacing(other)
