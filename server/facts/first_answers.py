"""What the model said about a fact before anybody corrected it, also where a correction of it is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editors.edit import Edit
from editors.measure import Observation, observe
from server.transaction.workspace import Workspace
from store import EditRecord, fact_key


def first_answers(
    workspace: Workspace, edits: Sequence[Edit], seen: Observation, corrected: Sequence[EditRecord]
) -> Observation:
    """The observation, with the original model's answers to what active edits (`corrected`) answer now.

    An edit that replaces another is compared with the model's answer before both of them. Otherwise its report would
    show the older edit's answer as the model's own. What is said about other subjects stays as observed.
    """
    keys = {fact_key(record.subject, record.prompt) for record in corrected}
    rows = [i for i, edit in enumerate(edits) if fact_key(edit.subject, edit.text) in keys]
    if not rows:
        return seen
    asked = [edits[i].model_copy(update={"neighbours": [], "portability": []}) for i in rows]
    with workspace.host.pristine():
        first = observe(workspace.lm, asked, first=True)
    p_target = list(seen.p_target)
    for i, p in zip(rows, first.p_target, strict=True):
        p_target[i] = p
    return replace(seen, answers={**seen.answers, **first.answers}, p_target=tuple(p_target))
