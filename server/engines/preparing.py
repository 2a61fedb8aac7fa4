"""What one push hands over, and the questions of its proof: made while holding the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from editors.model.lm import LM
from server.engines.artefacts import CHANGED, Artefact, write
from server.engines.engine import Engine
from server.engines.holdings import Holding, last_look
from server.engines.probes import (
    TOGETHER,
    EngineQuestion,
    ProofProbe,
    Reference,
    Wanted,
    canaries,
    first_tokens,
    probes_of,
    references,
    wanted_of,
)
from server.engines.settings import WITHOUT_ADDRESS
from server.errors import ServiceError
from server.exchange.distillation import Distillation
from server.exchange.distilling import distilled, refuse_untaught
from server.exchange.formats import loadable_base
from server.exchange.model_card import about, card
from server.facts.measuring import edit_of, judged_by, trained_on_by_record
from server.transaction.host import ActivePatch
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import STATES_NO_FACT, Workspace
from store import EditRecord

MOST_WITH_FORMS = 40
"""Edits of which all kinds of prompts are asked: the newest that the engine is not known to hold. The others have their
own prompt."""

MOST_SAID = 2000
"""Answers of the model here that are kept, so that a second engine or push asks it less."""


TEACHING = 0.9
"""Share of the work that is done when memories are taught, where there are any; for the progress alone."""
LIVE, WRITTEN = 0.6, 0.7
"""Shares of the rest that are done when the corrected model has answered, and when it is written."""
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Prepared:
    """What is handed over, and what will be asked."""

    artefact: Artefact
    probes: list[ProofProbe]
    weights_hash: str
    edit_ids: list[str]
    left_out: list[str]
    distilled: Distillation | None = None


def fitting(
    workspace: Workspace, leave_out: bool
) -> tuple[list[EditRecord], list[ActivePatch], list[EditRecord]]:
    """The active edits that are plain weights, their stack, and the others.

    Raises ServiceError that names the others where they cannot be taught to the weights, unless `leave_out`.
    """
    active = workspace.active_edits
    beside = {a.patch_id for a in workspace.host.stack if a.acts_beside}
    others = [e for e in active if e.patch_id in beside]
    kept = [e for e in active if e.patch_id not in beside]
    if others and not leave_out:
        refuse_untaught(workspace, others)
    return kept, without(workspace, others).stack, others


def prepare(
    workspace: Workspace,
    engine: Engine,
    leave_out: bool,
    former: Holding | None,
    report: Report = lambda *_: None,
    meanwhile: Callable[[Sequence[EngineQuestion]], None] = lambda _: None,
) -> Prepared:
    """Write what the engine gets and ask both models here. Call it while holding the model.

    Memories become weights first, unless they are left out. `meanwhile` is called with the probes' questions as soon as
    they are known, `report` with the share done, 0..1, and what is done.
    """
    if workspace.lm.is_seq2seq:
        raise ServiceError("engines serve decoder-only models; export_edits writes an encoder-decoder model")
    records, stack, beside = fitting(workspace, leave_out)
    taught: Distillation | None = None
    if beside and not leave_out:
        teaching, report = part(report, 0.0, TEACHING), part(report, TEACHING, 1.0)
        made = distilled(
            workspace, beside, stack, lambda done: teaching(done, "teaching memories to the weights")
        )
        stack, taught = [*stack, made.patch], made.report
        records = workspace.active_edits
    left_out = [record.id for record in beside] if leave_out else []
    facts = [record for record in records if not record.request.get(STATES_NO_FACT)]
    look = last_look(workspace.ledger, engine.settings.name)
    known = set(former.edit_ids if former and look and look.sure else ())
    report(0.0, "choosing the prompts to ask")
    wanted = [*_wanted(workspace, facts, known), *_gone(workspace, former, {record.id for record in records})]
    questions = [one.question(workspace.lm) for one in wanted]
    meanwhile(questions)
    rows = [question.ids for question in questions]
    with Transaction(workspace) as tx:  # never committed: a look at the weights without what acts beside them
        tx.stage(stack)
        weights_hash = workspace.host.weights_hash
        asked = partial(_said, workspace, weights_hash)
        longer, short = ([q.ids for q in questions if (q.tokens > 1) == many] for many in (True, False))
        answers = asked(longer, references, told(report, 0.0, LIVE, "asking the corrected model here"))
        firsts = asked(short, first_tokens, told(report, LIVE, WRITTEN, "asking the corrected model here"))
        answered, read = iter(answers), iter(firsts)
        live = [next(answered if question.tokens > 1 else read) for question in questions]
        report(WRITTEN, "writing the edits")
        artefact = _written(workspace, engine, records, stack, weights_hash, former)
    with workspace.host.pristine():
        asking = told(report, WRITTEN, 1.0, "asking the unedited model here")
        base = _said(workspace, workspace.host.base_hash, rows, first_tokens, asking)
    probes = probes_of(workspace.lm, wanted, live, base)
    return Prepared(artefact, probes, weights_hash, [record.id for record in records], left_out, taught)


def part(report: Report, start: float, end: float) -> Report:
    """Reports the progress of a part, `start`..`end`, of the whole."""
    return lambda done, what: report(start + (end - start) * done, what)


def told(report: Report, start: float, end: float, what: str) -> Callable[[int, int], None]:
    """The same, counted in prompts asked."""
    inner = part(report, start, end)
    return lambda done, of: inner(done / of, f"{what}: {done} of {of} prompts")


def _said(
    workspace: Workspace,
    state: str,
    rows: Sequence[tuple[int, ...]],
    ask: Callable[[LM, Sequence[Sequence[int]]], list[Reference]],
    progress: Callable[[int, int], None],
) -> list[Reference]:
    """The model's answers in the state with this hash. Rows that were asked in this state before are not asked
    again."""
    recent, kind = workspace.recent, ask.__name__
    known = {row: recent.get(kind, (state, row)) for row in dict.fromkeys(rows)}
    new = sorted(
        (row for row, said in known.items() if said is None), key=len
    )  # like lengths pad each other least
    for at in range(0, len(new), TOGETHER):
        progress(at, len(new))
        part = new[at : at + TOGETHER]
        for row, said in zip(part, ask(workspace.lm, part), strict=True):
            known[row] = said
            recent.put(kind, (state, row), said, MOST_SAID)
    return [known[row] for row in rows]


def _wanted(workspace: Workspace, records: Sequence[EditRecord], known: Collection[str]) -> list[Wanted]:
    lm = workspace.lm
    newest_ones = [record for record in records if record.id not in known][-MOST_WITH_FORMS:]
    fully = {record.id for record in newest_ones}
    edits, materials = judged_by(workspace, [edit_of(record) for record in newest_ones])
    trained = trained_on_by_record(workspace, newest_ones, workspace.host.stack)
    wanted = canaries(lm)
    wanted += [Wanted("edit", r.id, lm.prompt(edit_of(r).text)) for r in records if r.id not in fully]
    for record, edit, material, prompts in zip(newest_ones, edits, materials, trained, strict=True):
        seen = wanted_of(lm, record.id, edit, material)
        wanted += [one for one in seen if one.kind == "edit" or lm.user_text(one.prompt) not in prompts]
    return wanted


def _gone(workspace: Workspace, former: Holding | None, present: set[str]) -> list[Wanted]:
    """The prompts of edits that the engine still has from an earlier push and that are no longer active."""
    ids = [i for i in (former.edit_ids if former else ()) if i not in present]
    found = workspace.ledger.edits(ids) if ids else []
    facts = [record for record in found if not record.request.get(STATES_NO_FACT)]
    return [Wanted("gone", r.id, workspace.lm.prompt(edit_of(r).text)) for r in facts]


def _written(
    workspace: Workspace,
    engine: Engine,
    records: Sequence[EditRecord],
    stack: Sequence[ActivePatch],
    weights_hash: str,
    former: Holding | None,
) -> Artefact:
    settings = engine.settings
    folder = settings.folder or workspace.settings.home / "engines" / settings.name
    path = folder / f"{settings.name}-{weights_hash[:12]}-{time.time_ns():x}"
    also: Sequence[str] = ()
    if engine.form == "tensors" and former is not None:
        known = folder / former.version / CHANGED
        also = json.loads(known.read_text("utf-8")) if known.is_file() else ()
    notes = about(workspace, records, weights_hash)
    base = settings.model if settings.kind == "hub" else None
    name = (settings.repo or settings.adapter).rsplit("/", 1)[-1]

    def text_of(rank: int) -> str:
        return card(workspace, name, base or loadable_base(workspace), records, weights_hash, rank)

    shared = settings.kind in WITHOUT_ADDRESS  # people find it there; engines read no card
    return write(
        workspace, engine.form, stack, path, settings.max_rank, also, notes, base, text_of if shared else None
    )
