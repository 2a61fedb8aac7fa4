"""The service of engines: what each holds, audits, and pushes after every change where an engine says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from editors.errors import EditError
from editors.steering.stack import KIND as STEERING
from server.engines.engine import UNREACHABLE, Engine
from server.engines.holdings import Holding, last_look, newest
from server.engines.job import engine_named, engines_of
from server.engines.pushing import audit_engine
from server.engines.results import EngineList, EngineProof, EngineRow
from server.errors import ServiceError
from server.facts.history_results import Audit
from server.jobs.service import JobService
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, who
from store.errors import LedgerError

log = logging.getLogger("errata.engines")

LOOKING = 8  # engines looked at at once


class EngineService:
    """Engines as the tools see them. Reading takes no turn at the model."""

    def __init__(self, workspace: Workspace, jobs: JobService) -> None:
        self._workspace, self._jobs = workspace, jobs
        self._wake, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._pushed: dict[str, object] = {}

    def list(self) -> EngineList:
        """Every engine, whether it answers, and what it was last proven to hold."""
        names = list(engines_of(self._workspace))
        with ThreadPoolExecutor(LOOKING) as pool:
            rows = list(pool.map(self._row, names))
        todo = [f"push_edits(engine={row.name!r})." for row in rows if not row.current]
        todo += [f"audit_edits(engine={row.name!r}) when it is there." for row in rows if not row.reachable]
        return EngineList(engines=rows, next=todo[0] if todo else "")

    def _row(self, name: str) -> EngineRow:
        engine = engine_named(self._workspace, name)
        settings = engine.settings
        unreachable = engine.look()
        holding, problem, at = self._holding(name)
        return EngineRow(
            name=name,
            kind=settings.kind,
            push=settings.push,
            reachable=not unreachable,
            problem="; ".join(filter(None, [unreachable, problem])),
            holds=holding.weights_hash if holding else None,
            edit_ids=list(holding.edit_ids) if holding else [],
            current=holding is not None and self._is_current(holding),
            left_out=[*self._left_out(holding)] if holding else [],
            version=holding.version if holding else None,
            adapter=settings.repo or settings.adapter,
            proven=at if holding else None,
        )

    def _holding(self, name: str) -> tuple[Holding | None, str, str]:
        """What an engine was last proven to hold, what the last push or audit found wrong, and when that was."""
        ledger = self._workspace.ledger
        look = last_look(ledger, name)
        if look is None:
            return None, "", ""
        return (newest(ledger, name) if look.sure else None), look.problem, look.at

    def _is_current(self, holding: Holding) -> bool:
        left_out = self._left_out(holding)
        active = [record.id for record in self._workspace.active_edits]
        return [i for i in active if i not in left_out] == list(holding.edit_ids)

    def _left_out(self, holding: Holding) -> Sequence[str]:
        """The active edits that were left out of the push, and steering: engines are given none."""
        out = [r for r in self._workspace.active_edits if r.id in holding.left_out or r.method == STEERING]
        return [record.id for record in out if record.id not in holding.edit_ids]

    def prove(self, name: str, ctx: RequestContext | None = None) -> EngineProof:
        """Ask an engine again what it was last proven to hold, and note the result on the ledger."""
        return audit_engine(self._workspace, self.engine(name), who(ctx or RequestContext()))

    def audit(self, name: str, ctx: RequestContext | None = None) -> Audit:
        """`prove`, as audit_edits reports it. The model here is not held meanwhile: an engine may be slow."""
        ctx = ctx or RequestContext()
        if ctx.ticket is not None:
            self._workspace.queue.withdraw(ctx.ticket)
        proof = self.prove(name, ctx)
        holding = newest(self._workspace.ledger, name)
        current = holding is not None and self._is_current(holding)
        return Audit(
            summary=_summary(proof, current, self._left_out(holding) if holding else []),
            edits=[],
            holding=len(proof.held),
            failing=proof.missing,
            engine=proof,
            weights_hash=proof.weights_hash,
            seconds=proof.seconds,
            next=_next(proof, current),
        )

    def engine(self, name: str) -> Engine:
        """An engine by name. Raises ServiceError."""
        return engine_named(self._workspace, name)

    # --- after every change ----------------------------------------------------------------------

    def follow(self, on_change: Callable[[Callable[[], None]], None]) -> None:
        """From now on push to the engines with push = "always" after each change of the active edits."""
        self._always = [n for n, s in engines_of(self._workspace).items() if s.push == "always"]
        if not self._always or self._workspace.read_only:
            return
        for name in self._always:
            holding, _, _ = self._holding(name)
            self._pushed[name] = self._key() if holding and self._is_current(holding) else None
        on_change(self._wake.set)
        self._thread = threading.Thread(target=self._follow, name="errata-engines", daemon=True)
        self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """End following."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)

    def _key(self) -> object:
        """The active patches as the ledger has them."""
        model = self._workspace.model_id
        return () if model is None else tuple((e.blob, e.rows) for e in self._workspace.ledger.stack(model))

    def _follow(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            try:
                self._push_changed()
            except (ServiceError, EditError, LedgerError) as error:
                log.error("engines that follow every change: %s", error)

    def _push_changed(self) -> None:
        key = self._key()
        for name in self._always:
            if self._pushed.get(name) == key:
                continue
            self._pushed[name] = key
            self._jobs.push_edits(name, leave_out=True)


def _unreachable(proof: EngineProof) -> str:
    """The error of an engine that answered no question; empty if it answered any."""
    errors = [probe.error for probe in proof.far]
    silent = not proof.held and errors and all(error.startswith(UNREACHABLE) for error in errors)
    return errors[0] if silent else ""


def _summary(proof: EngineProof, current: bool, left_out: Sequence[str]) -> str:
    """How many edits an engine holds, in words."""
    count = len(proof.held) + len(proof.missing)
    if silent := _unreachable(proof):
        return f"{silent}. So none of its {count} edits is proven."
    without = f", without {', '.join(left_out[:10])}" if left_out else ""
    others = "" if current else "; the active edits have changed since"
    return f"{proof.engine} holds {len(proof.held)} of {count} edits{without}{others}."


def _next(proof: EngineProof, current: bool) -> str:
    """What to call after an audit of an engine."""
    if _unreachable(proof):
        return (
            f"Whoever runs {proof.engine} starts it (list_engines says when it answers); then "
            f"audit_edits(engine={proof.engine!r}), or push_edits(engine={proof.engine!r}) where it has a restart "
            "command."
        )
    return "" if proof.proven and current else f"push_edits(engine={proof.engine!r})."
