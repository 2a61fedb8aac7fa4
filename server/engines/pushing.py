"""One push: write the edits, hand them over, prove that they landed; or give the engine its former state back."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.engines.artefacts import CHANGED, Artefact, write
from server.engines.engine import Engine, EngineError
from server.engines.holdings import AUDITED, PUSHED, Holding, newest, probes_file, write_probes
from server.engines.probes import Probe, Wanted, canaries, probes_of, references, wanted_of
from server.engines.proof import Proof, Reading, prove, same_readings
from server.engines.results import EngineProof, ProbeAnswer, PushResult
from server.errors import ServiceError
from server.exchange.model_card import about
from server.facts.material import collect
from server.facts.measuring import edit_of, trained_on_by_record
from server.transaction.host import ActivePatch
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import STATES_NO_FACT, Workspace
from store import EditRecord, Who

log = logging.getLogger("errata.engines")

MOST_WITH_FORMS = 40
"""Edits of which all kinds of prompts are asked; of more, the newest have them and the others their own prompt."""
SHOWN = 10
"""Prompts that differ, in a report."""
KEPT = 3
"""Artefacts of one engine that are kept: the newest, the way back, and one more."""


@dataclass(frozen=True)
class Prepared:
    """What is handed over, and what will be asked."""

    artefact: Artefact
    probes: list[Probe]
    weights_hash: str
    edit_ids: list[str]
    left_out: list[str]


def fitting(workspace: Workspace, leave_out: bool) -> tuple[list[EditRecord], list[ActivePatch], list[str]]:
    """The active edits that are plain weights, their stack, and the ids of the others.

    Raises ServiceError that names the others, unless `leave_out`.
    """
    active = workspace.active_edits
    beside = {a.patch_id for a in workspace.host.stack if a.patch.kind != "weight"}
    others = [e for e in active if e.patch_id in beside]
    kept = [e for e in active if e.patch_id not in beside]
    if others and not leave_out:
        named = ", ".join(f"{e.id} ({e.method})" for e in others)
        raise ServiceError(
            f'{named}: act beside the weights, and no engine has that; apply_edits(goal="export", replace=true) '
            "makes them plain weights, or push_edits(leave_out=true) hands over the other edits alone"
        )
    return kept, without(workspace, others).stack, [e.id for e in others]


def prepare(workspace: Workspace, engine: Engine, leave_out: bool, former: Holding | None) -> Prepared:
    """Write what the engine gets and ask both models here. Call it while holding the model."""
    if workspace.lm.is_seq2seq:
        raise ServiceError("engines serve decoder-only models; export_edits writes an encoder-decoder model")
    records, stack, left_out = fitting(workspace, leave_out)
    facts = [record for record in records if not record.request.get(STATES_NO_FACT)]
    wanted = _wanted(workspace, facts)
    gone = _gone(workspace, former, {record.id for record in records})
    rows = [tuple(workspace.lm.encode(one.prompt)[0]) for one in (*wanted, *gone)]
    with workspace.host.pristine():
        base = references(workspace.lm, rows)
    with Transaction(workspace) as tx:  # never committed: a look at the weights without what acts beside them
        tx.stage(stack)
        weights_hash = workspace.host.weights_hash
        live = references(workspace.lm, rows)
        artefact = _written(workspace, engine, records, stack, weights_hash, former)
    probes = probes_of(workspace.lm, [*wanted, *gone], live, base)
    return Prepared(artefact, probes, weights_hash, [record.id for record in records], left_out)


def _wanted(workspace: Workspace, records: Sequence[EditRecord]) -> list[Wanted]:
    lm = workspace.lm
    newest_ones = records[-MOST_WITH_FORMS:]
    edits = [edit_of(record) for record in newest_ones]
    with workspace.host.pristine():
        materials = collect(workspace, edits) if edits else []
    trained = trained_on_by_record(workspace, newest_ones, workspace.host.stack)
    wanted = canaries(lm)
    wanted += [Wanted("edit", r.id, lm.prompt(edit_of(r).text)) for r in records[:-MOST_WITH_FORMS]]
    for record, edit, material, prompts in zip(newest_ones, edits, materials, trained, strict=True):
        seen = wanted_of(lm, record.id, edit, material)
        wanted += [one for one in seen if one.kind == "edit" or lm.user_text(one.prompt) not in prompts]
    return wanted


def _gone(workspace: Workspace, former: Holding | None, present: set[str]) -> list[Wanted]:
    """The prompts of edits that the engine has from before and that are active no more."""
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
    return write(workspace, engine.form, stack, path, settings.max_rank, also, notes)


def push(
    workspace: Workspace, engine: Engine, leave_out: bool, who: Who, check: Any, report: Any
) -> PushResult:
    """Push the active edits to an engine. The result says whether they landed; nothing is raised when they did not.

    Raises ServiceError for what cannot be pushed at all; then the engine was not touched.
    """
    started = time.monotonic()
    former = newest(workspace.ledger, engine.settings.name)
    if problem := engine.base_is_missing():
        raise ServiceError(f"{engine.settings.name}: {problem}")
    report(0.1, "writing the edits")
    with workspace.turn(check=check, bounded=False):
        prepared = prepare(workspace, engine, leave_out, former)
    report(0.4, "asking the engine")
    before = engine.read(prepared.probes)
    report(0.6, "handing the edits over")
    problem = put(engine, prepared.artefact)
    report(0.7, "asking the engine")
    after = engine.read(prepared.probes)
    proof = _proof(engine, prepared.probes, after)
    rolled_back, restored = False, None
    if problem or not proof.proven:
        rolled_back, said = _back(engine, former)
        problem = "; ".join(filter(None, [problem or why(proof), said]))
        restored = same_readings(before, engine.read(prepared.probes), 2 * engine.settings.bound)
    result = PushResult(
        engine=engine.settings.name,
        version=prepared.artefact.path.name,
        edit_ids=prepared.edit_ids,
        left_out=prepared.left_out,
        ranks=dict(prepared.artefact.ranks),
        proof=proof_result(engine, proof, prepared.weights_hash, started),
        before=proof_result(engine, _proof(engine, prepared.probes, before), prepared.weights_hash, started),
        rolled_back=rolled_back,
        restored=restored,
        problem=problem,
        seconds=time.monotonic() - started,
    )
    _record(workspace, engine, prepared, result, who)
    return result


def put(engine: Engine, artefact: Artefact) -> str:
    """Hand over; what the engine said against it, empty where nothing."""
    try:
        engine.put(artefact)
    except EngineError as error:
        return str(error)
    return ""


def _back(engine: Engine, former: Holding | None) -> tuple[bool, str]:
    """Give the engine what it held before; whether that was done, and what stood in the way.

    An engine whose weights are reloaded is broken by a reload that fails: where its former edits cannot be given back
    it gets the base model. One with adapters goes on serving what it has.
    """
    wrong = ""
    if former is not None:
        artefact = former.artefact(engine)
        wrong = put(engine, artefact) if artefact.is_whole() else f"{artefact.path} is not whole"
        if not wrong:
            return True, ""
        wrong = f"its former edits could not be given back: {wrong}"
        if engine.form not in ("tensors", "merged"):
            return False, wrong
    try:
        engine.take_off()
    except EngineError as error:
        return False, wrong or f"its former state could not be given back: {error}"
    return not wrong, f"{wrong}; it serves the base model" if wrong else ""


def _proof(engine: Engine, probes: Sequence[Probe], readings: Sequence[Reading]) -> Proof:
    return prove(probes, readings, engine.settings.bound, engine.settings.precision)


def why(proof: Proof) -> str:
    """In words, why a proof fails."""
    if errors := [j.reading.error for j in proof.far if j.reading.error]:
        return f"the engine did not answer: {errors[0]}"
    if proof.missing:
        return f"the engine does not hold {', '.join(proof.missing[:10])}"
    if proof.far:
        return (
            f"the engine answers {len(proof.far)} prompts otherwise, first {proof.far[0].probe.text[-80:]!r}"
        )
    return (
        f"no edit can be told from the unedited model within {proof.bound:g} nats, so nothing is proven; an engine "
        "of higher precision, or a smaller `tolerance` in the engines' file, can tell more"
    )


def proof_result(engine: Engine, proof: Proof, weights_hash: str, started: float) -> EngineProof:
    """A proof as the tools report it."""
    gone = [j.near for j in proof.judged if j.probe.kind == "gone"]
    told = [j for j in proof.judged if j.reading.answer is not None]
    same = [
        j.reading.answer[: len(j.probe.live.answer)] == j.probe.live.answer for j in told if j.reading.answer
    ]
    return EngineProof(
        engine=engine.settings.name,
        kind=engine.settings.kind,
        proven=proof.proven,
        weights_hash=weights_hash,
        held=list(proof.held),
        missing=list(proof.missing),
        indistinct=list(proof.indistinct),
        gone=all(gone),
        probes=len(proof.judged),
        bound=proof.bound,
        worst=_finite(proof.worst),
        same_answers=sum(same) / len(same) if same else None,
        far=[
            ProbeAnswer(
                kind=j.probe.kind,
                edit_id=j.probe.edit_id,
                prompt=j.probe.text[-400:],
                difference=_finite(j.to_live),
                to_base=_finite(j.to_base),
                said=j.reading.text[:200],
                error=j.reading.error[:300],
            )
            for j in proof.far[:SHOWN]
        ],
        seconds=time.monotonic() - started,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _record(workspace: Workspace, engine: Engine, prepared: Prepared, result: PushResult, who: Who) -> None:
    """The push and its proof on the ledger; the prompts and what was said here beside it, by their hash."""
    name, artefact = engine.settings.name, prepared.artefact
    payload: dict[str, Any] = {
        "engine": name,
        "kind": engine.settings.kind,
        "version": artefact.path.name,
        "files": dict(artefact.sha256),
        "form": artefact.form,
        "left_out": prepared.left_out,
        "rolled_back": result.rolled_back,
        "restored": result.restored,
        "problem": result.problem[:2000],
        "pushed": prepared.edit_ids,
        "of": prepared.weights_hash,
        **measured(result.proof),
    }
    if result.proof.proven and not result.problem:
        payload["probes"] = write_probes(workspace, name, artefact.path.name, prepared.probes)
    workspace.ledger.record_event(
        PUSHED, payload, who, model_id=workspace.model_id, edit_ids=prepared.edit_ids
    )
    _forget_old(engine, workspace, artefact.path.parent)


def measured(proof: EngineProof) -> Mapping[str, Any]:
    """What the ledger keeps of a proof."""
    return {
        "proven": proof.proven,
        "held": proof.held,
        "missing": proof.missing,
        "indistinct": proof.indistinct,
        "gone": proof.gone,
        "asked": proof.probes,
        "bound": proof.bound,
        "worst": proof.worst,
        "same_answers": proof.same_answers,
    }


def _forget_old(engine: Engine, workspace: Workspace, folder: Path) -> None:
    """Remove artefacts of this engine that nothing leads back to."""
    name = engine.settings.name
    former = newest(workspace.ledger, name)
    mine = sorted(folder.glob(f"{name}-*-*"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in mine[KEPT:]:
        if path.is_dir() and (former is None or path.name != former.version):
            shutil.rmtree(path, ignore_errors=True)
            probes_file(workspace, name, path.name).unlink(missing_ok=True)


def audit_engine(workspace: Workspace, engine: Engine, who: Who) -> EngineProof:
    """Ask an engine again what it was last proven to hold. Raises ServiceError where nothing was ever proven."""
    started = time.monotonic()
    name = engine.settings.name
    holding = newest(workspace.ledger, name)
    if holding is None:
        raise ServiceError(f"{name} was never proven to hold any edits; push_edits(engine={name!r}) first")
    probes = holding.probes(workspace)
    proof = _proof(engine, probes, engine.read(probes))
    result = proof_result(engine, proof, holding.weights_hash, started)
    payload = {
        "engine": name,
        "kind": engine.settings.kind,
        "version": holding.version,
        "of": holding.weights_hash,
        "problem": "" if proof.proven else why(proof)[:2000],
        **measured(result),
    }
    if not workspace.read_only:
        workspace.ledger.record_event(
            AUDITED, payload, who, model_id=workspace.model_id, edit_ids=holding.edit_ids
        )
    return result
