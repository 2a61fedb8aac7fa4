"""Memories as weights: what the model with its memories says is taught to the model without them, and measured.

An adapter or a merged model holds no memory. So each edit that acts beside the weights becomes a low-rank change.
It learns the live model's own answers to the edit's forms, while other facts of the subject are held. It is judged by
forms, facts and texts that it did not learn from. The report says what was lost; `format="facts"` writes the same edits
as text instead.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from editors.asked import asked_says
from editors.bounded_files import read_regular
from editors.edit import Edit
from editors.errors import EditError
from editors.files import write_atomically
from editors.finetune.distil import Lesson, distil
from editors.forms.form import Material
from editors.measure import observe
from editors.model.lm import LM, Prompt
from editors.outcomes import Outcome, ProbeResult, outcomes
from editors.patch import Patch, WeightPatch, save
from editors.patch_kinds import load
from editors.prompt_templates import with_other_subjects
from editors.steering.stack import unsteered
from server.errors import ServiceError
from server.exchange.distillation import Distillation, DistilledEdit
from server.facts.material import collect
from server.facts.measuring import edit_of
from server.facts.neighbours import with_neighbours
from server.transaction.host import ActivePatch
from server.transaction.stack import digest
from server.transaction.transaction import PENDING, Transaction
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord

METHOD = "distilled"
VERSION = 1  # of the training: results of another version are not used again
MOST = 100
"""Memories that are taught at once: each takes a training."""
FORMS, HELD, OTHERS = 5, 4, 3
"""Rows of one edit: forms to learn, facts of its subject to hold, other subjects whose answers stay."""
TOKENS = 24
SHOWN = 5
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)
Report = Callable[[float], None]


@dataclass(frozen=True)
class Distilled:
    """What the memories became, to be staged on top of the weights, and how much of them it holds."""

    patch: ActivePatch
    report: Distillation


def refuse_untaught(workspace: Workspace, records: Sequence[EditRecord]) -> None:
    """Raise ServiceError that names what cannot be taught: steering and adapters without facts, or too many edits."""
    facts = {record.id for record in fact_edits(records)}
    if others := [f"{r.id} ({r.method})" for r in records if r.id not in facts]:
        raise ServiceError(
            f"refused: {', '.join(others)} are not weights, and state no fact that could be trained into weights. "
            "set_steering(name, 0) switches steering off; push_edits(leave_out=true) hands over the edits in the "
            "weights alone, without memories, and export_edits(edit_ids=[...]) those that are named"
        )
    if workspace.lm.is_seq2seq:
        raise ServiceError(
            'memories of an encoder-decoder model are not taught to its weights; format="facts" writes them as text'
        )
    if len(records) > MOST:
        raise ServiceError(
            f"{len(records)} edits act beside the weights, and at most {MOST} are taught at once; "
            'format="facts" writes them as text, or name fewer'
        )


def distilled(
    workspace: Workspace, records: Sequence[EditRecord], stack: Sequence[ActivePatch], report: Report
) -> Distilled:
    """Teach the weights in `stack` what these memories, active now, say. Call it while holding the model.

    What was taught once for the same stack is read from HOME/distilled. Raises what `refuse_untaught` raises.
    """
    refuse_untaught(workspace, records)
    key = _key(workspace, records, stack)
    if (known := _read(workspace, key)) is not None:
        return known
    started = time.monotonic()
    report(0.0)
    lm, edits = workspace.lm, [edit_of(record) for record in records]
    with unsteered(lm):
        materials = collect(workspace, edits)
        edits = with_neighbours(edits, workspace.active_subjects)
        lessons = [_lesson(lm, e, m) for e, m in zip(edits, materials, strict=True)]
        live = observe(lm, edits, materials=materials)
        report(0.2)
        with Transaction(workspace) as tx:  # never committed
            tx.stage(stack)
            before, perplexity = observe(lm, edits, materials=materials), workspace.drift().perplexity_after
            report(0.3)
            patch = distil(lm, lessons, lambda done: report(0.3 + 0.5 * done))
            active = ActivePatch(-1, PENDING, METHOD, patch, tuple(range(len(records))), digest(save(patch)))
            tx.stage([*stack, active])
            after, ratio = (
                observe(lm, edits, materials=materials),
                workspace.drift().perplexity_after / perplexity,
            )
    trained = [_prompts(lesson, lm) for lesson in lessons]
    rows = [outcomes(edits, before, seen, trained=trained, materials=materials) for seen in (live, after)]
    found = [_row(r, *pair) for r, *pair in zip(records, *rows, strict=True)]
    result = _sum(found, rows[1], ratio, time.monotonic() - started)
    _keep(workspace, key, patch, result)
    return Distilled(active, result)


def _lesson(lm: LM, edit: Edit, material: Material) -> Lesson:
    """The live model's answers to the edit's own prompt and its learned forms, and what must stay."""
    own = lm.prompt(edit.text)
    forms = [form for form in material.learned if form.prompt != edit.text][:FORMS]
    prompts = [form.in_model(lm) for form in forms]
    said: list[tuple[Prompt, tuple[int, int] | None, str]] = [(own, edit.span, edit.target)]
    for form, prompt, answer in zip(
        forms, prompts, lm.generate(prompts, TOKENS) if forms else [], strict=True
    ):
        target = form.target or edit.target
        if not form.chat:
            said.append((prompt, form.span, target))
        elif asked_says(form, answer.text, target):
            said.append((prompt, form.span, _first_sentence(answer.text)))
    kept = [(hold.in_model(lm), hold.said or hold.answer) for hold in material.held[:HELD]]
    kept += [(lm.prompt(text), "") for text in with_other_subjects(edit.text, edit.span, OTHERS)]
    return Lesson(tuple(said), tuple(kept))


def _first_sentence(text: str) -> str:
    found = _SENTENCE.match(text.strip())
    return found[0] if found else text.strip()


def _prompts(lesson: Lesson, lm: LM) -> set[str]:
    """What was taught from, as the user writes it: left out of every rate."""
    prompts = [prompt for prompt, _, _ in lesson.said] + [prompt for prompt, _ in lesson.kept]
    return {lm.user_text(prompt) for prompt in prompts}


def _row(record: EditRecord, live: Outcome, taught: Outcome) -> DistilledEdit:
    held = {p.prompt for p in taught.probes if p.held}
    lost = [p.prompt for p in _unseen(live) if p.held and p.prompt not in held]
    return DistilledEdit(
        edit_id=record.id,
        method=record.method,
        said=taught.reliability == 1,
        live=_rate([p.held for p in _unseen(live)]),
        taught=_rate([p.held for p in _unseen(taught)]),
        lost=lost[:SHOWN],
        moved=[p.prompt for p in taught.probes if p.kind in ("sibling", "neighbour") and not p.held][:SHOWN],
        subject_locality=taught.rate("sibling"),
        locality=taught.rate("neighbour"),
    )


def _unseen(outcome: Outcome) -> list[ProbeResult]:
    """The edit in wordings that it was not taught from."""
    return [p for p in outcome.probes if p.kind in ("form", "paraphrase") and not p.trained]


def _sum(rows: list[DistilledEdit], taught: Sequence[Outcome], ratio: float, seconds: float) -> Distillation:
    lives, taughts = ([getattr(r, n) for r in rows if getattr(r, n) is not None] for n in ("live", "taught"))
    live, kept = _rate(lives), _rate(taughts)
    return Distillation(
        edits=rows,
        said=sum(row.said for row in rows) / len(rows),
        live=live,
        taught=kept,
        loss=None if live is None or kept is None else live - kept,
        subject_locality=_rate([p.held for o in taught for p in o.probes if p.kind == "sibling"]),
        locality=_rate([p.held for o in taught for p in o.probes if p.kind == "neighbour" and not p.trained]),
        perplexity_ratio=ratio,
        seconds=seconds,
    )


def _rate(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def losses_in_words(taught: Distillation | None) -> list[str]:
    """Warnings about memories that were exported as weights."""
    if taught is None:
        return []
    named = ", ".join(f"{row.edit_id} ({row.method})" for row in taught.edits)
    shares = [f"say the fact after its own prompt for {taught.said:.0%} of the edits"]
    if taught.live is not None and taught.taught is not None:
        shares.append(f"answer {taught.taught:.0%} of other wordings (the memories {taught.live:.0%})")
    if taught.subject_locality is not None:
        shares.append(f"keep {taught.subject_locality:.0%} of the subjects' other facts")
    if taught.locality is not None:
        shares.append(f"keep {taught.locality:.0%} of neighbours")
    moved = [prompt for row in taught.edits for prompt in row.moved]
    if moved:
        shares[-1] += f" (changed: {', '.join(map(repr, moved[:3]))})"
    return [
        f"{named}: a memory is not part of the weights, so what it answers was taught to weights, which is less. These "
        f"weights {', '.join(shares)}; perplexity x{taught.perplexity_ratio:.2f}. "
        'If that is not enough: apply_edits(goal="export") makes edits that are weights from the start; '
        'export_edits(format="facts") writes the facts as text, format="patches" the memories as they are.'
    ]


# --- what was taught once ------------------------------------------------------------------------


def _key(workspace: Workspace, records: Sequence[EditRecord], stack: Sequence[ActivePatch]) -> str:
    live = [(active.blob, active.rows) for active in workspace.host.stack]
    parts = [
        VERSION,
        workspace.host.base_hash,
        live,
        [a.blob for a in stack],
        [record.id for record in records],
    ]
    return digest(json.dumps(parts).encode())[:32]


def _files(workspace: Workspace, key: str) -> tuple[Path, Path]:
    folder = workspace.settings.home / "distilled"
    return folder / f"{key}.safetensors", folder / f"{key}.json"


def _keep(workspace: Workspace, key: str, patch: Patch, report: Distillation) -> None:
    if workspace.read_only:
        return
    with suppress(OSError):  # it is made again the next time
        for file, data in zip(
            _files(workspace, key), (save(patch), report.model_dump_json().encode()), strict=True
        ):
            write_atomically(file, data)


def _read(workspace: Workspace, key: str) -> Distilled | None:
    weights, report = _files(workspace, key)
    try:
        data = read_regular(weights)
        found = Distillation.model_validate_json(read_regular(report))
        patch = load(data)
    except (OSError, ValueError, EditError):  # damaged, or of another version: it is made again
        return None
    if not isinstance(patch, WeightPatch):
        return None
    return Distilled(
        ActivePatch(-1, PENDING, METHOD, patch, tuple(range(len(found.edits))), digest(data)), found
    )
