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
from server.facts import asking as beliefs
from server.facts import auditing as history
from server.facts import editing as transactions
from server.facts.asking import FactQuery
from server.facts.auto_method import RULE
from server.facts.editing import Request
from server.facts.guard import Guard
from server.facts.reports import edit_row
from server.request_context import RequestContext
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
from server.transaction.host import ModelHost
from server.transaction.replay import Report, open_workspace
from server.transaction.workspace import Workspace, facts_of
from store import EditFilter, Ledger

__all__ = ["FactQuery", "Services"]


class Services:
    """One model with its ledger."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @classmethod
    def open(cls, settings: Settings, lm: LM, ledger: Ledger, progress: Report) -> Services:
        """Replay the ledger onto the model and check the result; damage makes it read-only, named in `status`."""
        return cls(open_workspace(settings, lm, ledger, progress))

    @property
    def ledger(self) -> Ledger:
        return self.workspace.ledger

    @property
    def host(self) -> ModelHost:
        return self.workspace.host

    @property
    def statistics(self) -> Statistics:
        return self.workspace.statistics

    @property
    def lock(self) -> threading.RLock:
        return self.workspace.host.lock

    def close(self) -> None:
        """Wait for the running call, then close the ledger. A running job stops at its next step and is kept."""
        if self.workspace.jobs is not None:
            self.workspace.jobs.stop()
        with self.lock:
            self.workspace.ledger.close()

    # --- inspect -------------------------------------------------------------------------------

    def status(self) -> ModelStatus:
        """How things stand; does not wait for a running edit."""
        workspace, lm = self.workspace, self.workspace.lm
        active = workspace.ledger.active_edits(workspace.model_id) if workspace.model_id is not None else []
        return ModelStatus(
            state="ready",
            model=lm.name,
            message="; ".join(filter(None, [workspace.read_only, *workspace.notes])),
            architecture=lm.arch.family,
            parameters=lm.parameters,
            layers=lm.n_layers,
            hidden_size=lm.d_model,
            device=str(lm.device),
            dtype=str(lm.dtype).removeprefix("torch."),
            weights_hash=workspace.host.weights_hash,
            base_hash=workspace.host.base_hash,
            state_hash=workspace.state_hash,
            active_edits=len(facts_of(active)),
            active_steering=[r.subject for r in active if r.method == STEERING],
            statistics={"second_moments": workspace.statistics.known()},
            methods=[
                MethodState(name=name, ready=not (n := self._needs(name)), needs=n)
                for name in sorted(METHODS)
            ],
            read_only=bool(workspace.read_only),
            damage=workspace.damage,
            home=str(workspace.settings.home),
            version=errata_version(),
        )

    def _context(self) -> Context:
        return Context(self.workspace.statistics, trained=self.workspace.lm.trained)

    def _needs(self, name: str) -> list[str]:
        editor = METHODS[name]
        refusal = editor.supports(self.workspace.lm)
        return [refusal] if refusal else editor.needs(self.workspace.lm, self._context())

    def ask(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        chat: bool = False,
        temperature: float = 0.0,
        compare_to_base: bool = False,
        seed: int | None = None,
        ctx: RequestContext | None = None,
    ) -> Completion:
        """Continue a text, or answer a message."""
        with self.lock:
            (ctx or RequestContext()).check()
            return beliefs.complete(
                self.workspace, prompt, max_new_tokens, chat, temperature, compare_to_base, seed
            )

    def check_facts(self, facts: Sequence[FactQuery], ctx: RequestContext | None = None) -> FactChecks:
        """Compare what the model believes with what is right."""
        with self.lock:
            return beliefs.check_facts(self.workspace, facts, ctx or RequestContext())

    # --- edit ----------------------------------------------------------------------------------

    def preview(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        explain: bool = False,
        ctx: RequestContext | None = None,
    ) -> EditReport:
        """Apply's report with nothing kept. Conflicts count as replaced; `explain` adds what lies near."""
        with self.lock:
            request = Request(edits, method, params, guard, replace=True, explain=explain)
            return transactions.apply(self.workspace, request, ctx or RequestContext(), keep=False)

    def apply(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        replace: bool = False,
        reason: str | None = None,
        source: str | None = None,
        ctx: RequestContext | None = None,
    ) -> EditReport:
        """One transaction: computed, applied, measured, and kept only if the guard holds."""
        with self.lock:
            request = Request(edits, method, params, guard, replace, reason, source)
            return transactions.apply(self.workspace, request, ctx or RequestContext(), keep=True)

    def revert(
        self, edit_ids: Sequence[str], reason: str | None = None, ctx: RequestContext | None = None
    ) -> RevertReport:
        """Take edits back, in any order."""
        with self.lock:
            return transactions.revert(self.workspace, edit_ids, reason, ctx or RequestContext())

    def reapply(
        self, edit_ids: Sequence[str], reason: str | None = None, ctx: RequestContext | None = None
    ) -> EditReport:
        """Bring edits back from their stored patches."""
        with self.lock:
            return transactions.reapply(self.workspace, edit_ids, reason, ctx or RequestContext())

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
                    params=editor.schema(self.workspace.lm),
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
        page = self.workspace.ledger.list_edits(wanted, limit, cursor)
        return EditList(
            edits=[edit_row(r) for r in page.edits], next_cursor=page.next_cursor, total=page.total
        )

    def show_edit(self, edit_id: str) -> EditDetail:
        """Everything known of one edit."""
        return history.show(self.workspace.ledger, edit_id)

    def audit(
        self, edit_ids: Sequence[str] | None = None, repair: bool = False, ctx: RequestContext | None = None
    ) -> Audit:
        """Whether active edits still hold, and whether ledger, files and weights agree."""
        with self.lock:
            return history.audit(self.workspace, edit_ids, repair, ctx or RequestContext())

    def query(self, sql: str, params: Any = None, limit: int = 100) -> Rows:
        """One read-only statement."""
        started = time.monotonic()
        found = self.workspace.ledger.query(sql, params, limit)
        return Rows(
            columns=found.columns,
            rows=found.rows,
            truncated=found.truncated,
            seconds=time.monotonic() - started,
        )
