"""The unedited model's answers that the ledger has: what it said of an edit's prompts when they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editors.edit import Edit
from editors.measure import Observation
from server.transaction.workspace import Workspace
from store import EditRecord


def recorded_answers(
    workspace: Workspace, records: Sequence[EditRecord], edits: Sequence[Edit]
) -> list[Observation | None]:
    """What the unedited model says about each edit; None for an edit of which the ledger has not all.

    Greedy answers do not change, and the hash of the weights, in the precision that they are loaded in, tells that
    they are the same.
    """
    base = workspace.host.base_hash
    found = workspace.ledger.pristine_measurements(
        [r.id for r in records], base, workspace.pristine_state_hash
    )
    return [_observation(edit, found.get(record.id, ())) for record, edit in zip(records, edits, strict=True)]


def _observation(edit: Edit, measurements: Sequence[Mapping[str, Any]]) -> Observation | None:
    answers: dict[str, str] = {}
    p_target: float | None = None
    for values in measurements:
        answers[edit.text] = values["before"]
        p_target = values["p_target_before"]
        asked = [
            probe
            for probe in values["details"]
            if probe["kind"] in ("paraphrase", "neighbour", "portability")
        ]
        answers |= {probe["prompt"]: probe["before"] for probe in asked}
    wanted = [*edit.paraphrases, *(n.prompt for n in edit.neighbours), *(p.prompt for p in edit.portability)]
    if p_target is None or not answers.keys() >= set(wanted):
        return None
    return Observation(answers, (p_target,), (None,))
