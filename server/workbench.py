"""The use cases, as the tools call them. The only thing that touches both host and ledger.

Every method takes the host's one lock where it needs the model, so that calls from many threads
run one after another; reading the ledger alone does not wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from editors import METHODS
from editors.edit import Edit
from editors.method import Context
from editors.model.lm import LM
from editors.moments import Statistics
from editors.steering.stack import KIND as STEERING
from server import beliefs, history, transactions
from server.beliefs import FactQuery
from server.call import Call
from server.choose import RULE
from server.core import Core, facts_of
from server.guard import Guard
from server.host import ModelHost
from server.opening import Report, open_core
from server.reports import edit_row
from server.results import (
    Audit,
    Completion,
    EditDetail,
    EditList,
    EditReport,
    FactChecks,
    MethodInfo,
    MethodList,
    MethodState,
    ModelStatus,
    RevertReport,
    Rows,
)
from server.settings import Settings, errata_version
from server.transactions import Request
from store import EditFilter, Ledger

__all__ = ["FactQuery", "Workbench"]


class Workbench:
    """One model with its ledger."""

    def __init__(self, core: Core) -> None:
        self.core = core

    @classmethod
    def open(cls, settings: Settings, lm: LM, ledger: Ledger, progress: Report) -> Workbench:
        """Replay the ledger onto the model and check the result; damage makes it read-only, named in `status`."""
        return cls(open_core(settings, lm, ledger, progress))

    @property
    def ledger(self) -> Ledger:
        return self.core.ledger

    @property
    def host(self) -> ModelHost:
        return self.core.host

    @property
    def statistics(self) -> Statistics:
        return self.core.statistics

    @property
    def lock(self) -> threading.RLock:
        return self.core.host.lock

    def close(self) -> None:
        """Wait for the running call, then close the ledger. A running job stops at its next step and is kept."""
        if self.core.jobs is not None:
            self.core.jobs.stop()
        with self.lock:
            self.core.ledger.close()

    # --- inspect -------------------------------------------------------------------------------

    def status(self) -> ModelStatus:
        """How things stand; does not wait for a running edit."""
        core, lm = self.core, self.core.lm
        active = core.ledger.active_edits(core.model_id) if core.model_id is not None else []
        return ModelStatus(
            state="ready",
            model=lm.name,
            message="; ".join(filter(None, [core.read_only, *core.notes])),
            architecture=lm.arch.family,
            parameters=lm.parameters,
            layers=lm.n_layers,
            hidden_size=lm.d_model,
            device=str(lm.device),
            dtype=str(lm.dtype).removeprefix("torch."),
            weights_hash=core.host.weights_hash,
            base_hash=core.host.base_hash,
            state_hash=core.state_hash,
            active_edits=len(facts_of(active)),
            active_steering=[r.subject for r in active if r.method == STEERING],
            statistics={"second_moments": core.statistics.known()},
            methods=[
                MethodState(name=name, ready=not (n := self._needs(name)), needs=n)
                for name in sorted(METHODS)
            ],
            read_only=bool(core.read_only),
            damage=core.damage,
            home=str(core.settings.home),
            version=errata_version(),
        )

    def _context(self) -> Context:
        return Context(self.core.statistics, trained=self.core.lm.trained)

    def _needs(self, name: str) -> list[str]:
        editor = METHODS[name]
        refusal = editor.supports(self.core.lm)
        return [refusal] if refusal else editor.needs(self.core.lm, self._context())

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        chat: bool = False,
        temperature: float = 0.0,
        compare_to_base: bool = False,
        seed: int | None = None,
        call: Call | None = None,
    ) -> Completion:
        """Continue a text, or answer a message."""
        with self.lock:
            (call or Call()).check()
            return beliefs.complete(
                self.core, prompt, max_new_tokens, chat, temperature, compare_to_base, seed
            )

    def check_facts(self, facts: Sequence[FactQuery], call: Call | None = None) -> FactChecks:
        """Compare what the model believes with what is right."""
        with self.lock:
            return beliefs.check_facts(self.core, facts, call or Call())

    # --- edit ----------------------------------------------------------------------------------

    def preview(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        explain: bool = False,
        call: Call | None = None,
    ) -> EditReport:
        """Apply's report with nothing kept. Conflicts count as replaced; `explain` adds what lies near."""
        with self.lock:
            request = Request(edits, method, params, guard, replace=True, explain=explain)
            return transactions.apply(self.core, request, call or Call(), keep=False)

    def apply(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        replace: bool = False,
        reason: str | None = None,
        source: str | None = None,
        call: Call | None = None,
    ) -> EditReport:
        """One transaction: computed, applied, measured, and kept only if the guard holds."""
        with self.lock:
            request = Request(edits, method, params, guard, replace, reason, source)
            return transactions.apply(self.core, request, call or Call(), keep=True)

    def revert(
        self, edit_ids: Sequence[str], reason: str | None = None, call: Call | None = None
    ) -> RevertReport:
        """Take edits back, in any order."""
        with self.lock:
            return transactions.revert(self.core, edit_ids, reason, call or Call())

    def reapply(
        self, edit_ids: Sequence[str], reason: str | None = None, call: Call | None = None
    ) -> EditReport:
        """Bring edits back from their stored patches."""
        with self.lock:
            return transactions.reapply(self.core, edit_ids, reason, call or Call())

    def methods(self) -> MethodList:
        """Every method with its parameters' schema and this model's defaults."""
        found = []
        for name, editor in sorted(METHODS.items()):
            needs = self._needs(name)
            found.append(
                MethodInfo(
                    name=name,
                    family=editor.family,
                    title=editor.title,
                    description=editor.description,
                    source=editor.source,
                    when=editor.when,
                    cost=editor.cost,
                    needs=needs,
                    ready=not needs,
                    kind=editor.kind,
                    batch=editor.batch,
                    params=editor.schema(self.core.lm),
                )
            )
        return MethodList(methods=found, auto=RULE)

    # --- ledger --------------------------------------------------------------------------------

    def list_edits(
        self,
        status: str | None = None,
        subject: str | None = None,
        text: str | None = None,
        method: str | None = None,
        since: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> EditList:
        """A page of the ledger, newest first."""
        wanted = EditFilter(status=status, subject=subject, text=text, method=method, since=since)
        page = self.core.ledger.list_edits(wanted, limit, cursor)
        return EditList(
            edits=[edit_row(r) for r in page.edits], next_cursor=page.next_cursor, total=page.total
        )

    def show_edit(self, edit_id: str) -> EditDetail:
        """Everything known of one edit."""
        return history.show(self.core.ledger, edit_id)

    def audit(
        self, edit_ids: Sequence[str] | None = None, repair: bool = False, call: Call | None = None
    ) -> Audit:
        """Whether active edits still hold, and whether ledger, files and weights agree."""
        with self.lock:
            return history.audit(self.core, edit_ids, repair, call or Call())

    def query(self, sql: str, params: Any = None, limit: int = 100) -> Rows:
        """One read-only statement."""
        started = time.monotonic()
        found = self.core.ledger.query(sql, params, limit)
        return Rows(
            columns=found.columns,
            rows=found.rows,
            truncated=found.truncated,
            seconds=time.monotonic() - started,
        )
