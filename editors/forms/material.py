"""Make the material of an edit: forms to learn and to measure, the subject's other facts to hold and to measure.

A method finds it in `EditContext.materials`, one for each edit.
"""

from __future__ import annotations

from collections.abc import Sequence

from editors.edit import Edit, find_subject
from editors.forms.form import Form, Hold, Material
from editors.model.lm import LM

__all__ = ["Form", "Hold", "Material", "material_for", "materials_for"]


def material_for(lm: LM, edit: Edit, known: Sequence[Hold] = ()) -> Material:
    """The material of one edit. `known` are facts of its subject that the ledger knows."""
    return materials_for(lm, [edit], [known])[0]


def materials_for(lm: LM, edits: Sequence[Edit], known: Sequence[Sequence[Hold]] = ()) -> list[Material]:
    """The material of every edit of one call; the model is asked for all of them together."""
    facts = known or [()] * len(edits)
    return [Material(held=(*facts[i], *_callers(edit))) for i, edit in enumerate(edits)]


def _callers(edit: Edit) -> list[Hold]:
    return [Hold(n.prompt, n.answer or "", _span(n.prompt, edit.subject), "caller") for n in edit.holds]


def _span(prompt: str, subject: str) -> tuple[int, int] | None:
    if subject not in prompt:
        return None
    start = find_subject(prompt, subject)
    return start, start + len(subject)
