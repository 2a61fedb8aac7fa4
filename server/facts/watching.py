"""Active edits that hold before another change is made: do they still hold after it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editors.constants import limit
from editors.edit import Edit
from editors.measure import ANSWER_TOKENS, ask
from editors.scoring import answered_with
from server.facts.results import Changed
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord
from store.canonical import without_case_and_spacing

MOST = limit(
    24,
    "active edits that are asked before and after a change, at most: those of its subjects, then the latest",
    "time: a second or two on the default model; the others are asked by audit_edits",
)

ANSWERS = "watched"  # kind of the answers that are kept by state
MOST_KEPT = 8 * MOST


@dataclass(frozen=True)
class Watched:
    """An active edit that holds, with the model's answer."""

    record: EditRecord
    before: str


def watch(workspace: Workspace, edits: Sequence[Edit], replaced: Sequence[EditRecord] = ()) -> list[Watched]:
    """The active edits that hold now and are not about to be replaced."""
    gone, own = {record.id for record in replaced}, {edit.text for edit in edits}
    subjects = {without_case_and_spacing(edit.subject) for edit in edits}
    records = [r for r in fact_edits(workspace.active_edits) if r.id not in gone and r.prompt not in own]
    nearest = sorted(records, key=lambda r: (without_case_and_spacing(r.subject) not in subjects, -r.seq))
    asked = nearest[:MOST]
    answers = _ask(workspace, asked)
    return [
        Watched(r, answers[r.prompt]) for r in asked if answered_with(r.prompt, answers[r.prompt], r.target)
    ]


def lost(workspace: Workspace, watched: Sequence[Watched]) -> list[Changed]:
    """Those that no longer hold."""
    answers = _ask(workspace, [w.record for w in watched])
    return [
        Changed(
            prompt=w.record.prompt,
            before=w.before,
            after=answers[w.record.prompt],
            kind="edit",
            edit_id=w.record.id,
        )
        for w in watched
        if not answered_with(w.record.prompt, answers[w.record.prompt], w.record.target)
    ]


def _ask(workspace: Workspace, records: Sequence[EditRecord]) -> dict[str, str]:
    """Their answers in this state. The answers after one change are those before the next; they are not asked again."""
    if not records:
        return {}
    tokenizer = workspace.lm.tokenizer
    longest = max(len(tokenizer(r.target, add_special_tokens=False)["input_ids"]) for r in records)
    tokens, state, recent = max(ANSWER_TOKENS, longest + 3), workspace.state_hash, workspace.recent
    known = {r.prompt: recent.get(ANSWERS, (state, r.prompt, tokens)) for r in records}
    said = ask(workspace.lm, [prompt for prompt, answer in known.items() if answer is None], tokens)
    for prompt, answer in said.items():
        recent.put(ANSWERS, (state, prompt, tokens), answer, MOST_KEPT)
    return known | said
