"""Facts as text, for engines that hold no memory: a system prompt, and a file of records for retrieval.

What acts beside the weights (memories, code books) leaves as the facts themselves. How well the unedited model says
them with the system prompt is measured, since that is less than what a memory does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from editors.edit import Edit
from editors.scoring import says
from server.answering.stopping import UNFINISHED
from server.facts.measuring import edit_of
from server.transaction.workspace import Workspace
from store import EditRecord

SYSTEM, FACTS = "system_prompt.txt", "facts.jsonl"
OPENING = "Take these facts as true, whatever you learned before:"
MOST_ASKED = 40  # facts that are asked with the system prompt
TOKENS = 24


def write_facts(workspace: Workspace, records: Sequence[EditRecord], folder: Path) -> float | None:
    """Write both files; the share of the facts that the pristine model then says, of the newest `MOST_ASKED`.

    None where the model has no chat template to put a system prompt into, or no room for it.
    """
    edits = [edit_of(record) for record in records]
    system = "\n".join([OPENING, *(f"- {sentence(edit)}" for edit in edits)])
    (folder / SYSTEM).write_text(system + "\n", "utf-8")
    rows = [_row(record, edit) for record, edit in zip(records, edits, strict=True)]
    (folder / FACTS).write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), "utf-8")
    return _said(workspace, system, edits[-MOST_ASKED:])


def sentence(edit: Edit) -> str:
    """The fact in words."""
    text = f"{edit.text} {edit.target}"
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _row(record: EditRecord, edit: Edit) -> dict[str, object]:
    """One fact for a retriever: what to match, what to say."""
    return {
        "id": record.id,
        "subject": edit.subject,
        "prompt": edit.text,
        "answer": edit.target,
        "text": sentence(edit),
        "questions": list(edit.paraphrases),
        "source": record.source,
    }


def _said(workspace: Workspace, system: str, edits: Sequence[Edit]) -> float | None:
    lm = workspace.lm
    if not lm.has_chat_template or not edits:
        return None
    prompts = [
        lm.conversation(
            [{"role": "system", "content": system}, {"role": "user", "content": f"Go on: {edit.text}"}]
        )
        for edit in edits
    ]
    room = getattr(lm.model.config, "max_position_embeddings", None)
    if room is not None and max(len(lm.encode(prompt)[0]) for prompt in prompts) + TOKENS > room:
        return None
    with workspace.host.pristine():
        answers = lm.generate(prompts, TOKENS)
    told = [
        says(answer.text.rstrip(UNFINISHED), edit.target, anywhere=True, question=edit.text)
        for answer, edit in zip(answers, edits, strict=True)
    ]
    return sum(told) / len(told)
