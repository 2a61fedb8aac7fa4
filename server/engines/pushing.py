"""One push: write the edits, hand them over, prove that they landed; or give the engine its former state back."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from editors.constants import limit
from server.engines.artefacts import Artefact
from server.engines.engine import Engine, EngineError, UnderWay
from server.engines.holdings import AUDITED, PUSHED, Holding, newest, probes_file, write_probes
from server.engines.preparing import Prepared, prepare
from server.engines.probes import ProofProbe, Reference
from server.engines.proof import EngineReading, Judged, Proof, distance, prove, same_readings
from server.engines.results import EngineProof, ProbeAnswer, PushResult
from server.errors import ServiceError
from server.exchange.distilling import losses_in_words
from server.transaction.workspace import Workspace
from store import Who

log = logging.getLogger("errata.engines")

SHOWN = 10
"""Prompts that differ, in a report."""
OTHER_MODEL = limit(
    1.0,
    "median difference of log-probabilities on ordinary texts beyond which an engine serves another model, nats",
    "weights are not pushed into another model: beyond it the push is refused. Edits move ordinary texts by some "
    "hundredths, another model by several nats",
)
KEPT = 3
"""Artefacts of one engine that are kept: the newest, the one to go back to, and one more."""


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
    report(0.0, "waiting for the model")
    begun: list[UnderWay] = []
    try:
        with workspace.turn(check=check, bounded=False):
            prepared = prepare(
                workspace,
                engine,
                leave_out,
                former,
                lambda done, what: report(0.5 * done, what),
                lambda questions: begun.append(engine.begin(questions)),
            )
        report(0.5, "asking the engine")
    except BaseException:
        for questions in begun:
            questions.stop()
        raise
    before = begun[0].read(prepared.probes)
    refuse_other_model(workspace, engine, former, prepared.probes, before)
    report(0.7, "handing the edits over and asking the engine")
    # From here on nothing may end the push before what the engine holds is on the ledger.
    problem = put(engine, prepared.artefact)
    after = engine.read(prepared.probes)
    proof = _proof(engine, prepared.probes, after)
    rolled_back, restored = False, None
    if problem or not proof.proven:
        rolled_back, said = _back(engine, former)
        said = said.replace(f": {problem}", ", for the same reason") if problem else said
        problem = "; ".join(filter(None, [problem or why(proof), said]))
        restored = same_readings(before, engine.read(prepared.probes), 2 * engine.settings.bound)
    warnings = losses_in_words(prepared.distilled)
    held = f"{engine.settings.name} is proven to hold {len(proof.held)} edits"
    result = PushResult(
        engine=engine.settings.name,
        summary="" if problem else "; ".join([held, *warnings]),
        version=prepared.artefact.path.name,
        edit_ids=prepared.edit_ids,
        left_out=prepared.left_out,
        ranks=dict(prepared.artefact.ranks),
        proof=proof_result(engine, proof, prepared.weights_hash, started),
        before=_before(engine, prepared, before, started, bool(problem)),
        rolled_back=rolled_back,
        restored=restored,
        distilled=prepared.distilled,
        problem=problem,
        warnings=warnings,
        seconds=time.monotonic() - started,
    )
    _record(workspace, engine, prepared, result, who)
    return result


def _before(
    engine: Engine, prepared: Prepared, before: Sequence[EngineReading], started: float, failed: bool
) -> EngineProof:
    """The same comparison before the push. Its single prompts matter only where the push failed."""
    found = proof_result(engine, _proof(engine, prepared.probes, before), prepared.weights_hash, started)
    return found if failed else found.model_copy(update={"far": []})


def refuse_other_model(
    workspace: Workspace,
    engine: Engine,
    former: Holding | None,
    probes: Sequence[ProofProbe],
    said: Sequence[EngineReading],
) -> None:
    """Raise ServiceError if an engine whose weights would be reloaded answers ordinary texts unlike both models here.

    Weights of another shape break it for good: vLLM 0.32 then loads not even its own again.
    """
    if engine.form not in ("tensors", "merged"):
        return
    had: dict[tuple[int, ...], Reference] = {}
    if former is not None:
        with suppress(ServiceError):  # its prompts are gone: it is compared with the others
            had = {probe.ids: probe.live for probe in former.probes(workspace)}
    apart = []
    for probe, reading in zip(probes, said, strict=True):
        if probe.kind == "canary" and not reading.error:
            sides = [probe.base, probe.live, had.get(probe.ids, probe.base)]
            apart.append(min(distance(replace(reading, scores=None), side) for side in sides))
    median = sorted(apart)[len(apart) // 2] if apart else 0.0
    if median > max(OTHER_MODEL, 2 * engine.settings.bound):
        raise ServiceError(
            f"{engine.settings.name} answers ordinary texts {median:.1f} nats from the model here (median): it serves "
            "another model, and weights pushed into it would break it; nothing was handed over"
        )


def put(engine: Engine, artefact: Artefact) -> str:
    """Hand the artefact over; returns the engine's error, or an empty text."""
    try:
        engine.put(artefact)
    except EngineError as error:
        return str(error)
    return ""


def _back(engine: Engine, former: Holding | None) -> tuple[bool, str]:
    """Give the engine its former artefact; returns whether that was done, and what prevented it.

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


def _proof(engine: Engine, probes: Sequence[ProofProbe], readings: Sequence[EngineReading]) -> Proof:
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
            for j in _shown(proof.far)
        ],
        seconds=time.monotonic() - started,
    )


def _shown(far: Sequence[Judged]) -> list[Judged]:
    """The worst prompts of a report. An error that many have in the same words is listed once."""
    told: set[str] = set()
    found = []
    for one in far:
        if not one.reading.error or one.reading.error not in told:
            found.append(one)
        told.add(one.reading.error)
    return found[:SHOWN]


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
        "distilled": None if prepared.distilled is None else prepared.distilled.model_dump(mode="json"),
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
    """Remove artefacts of this engine that no state on the ledger needs."""
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
