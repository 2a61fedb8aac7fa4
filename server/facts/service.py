"""The service of edits: preview, apply, revert, reapply, audit, and the methods there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors import METHODS
from editors.edit import Edit
from server.errors import ServiceError
from server.facts import applying, auditing, editing, explaining, forgetting
from server.facts.applying import Previewed, as_previewed
from server.facts.asking_results import Explanation
from server.facts.auto_method import RULE
from server.facts.edit_request import AUTO, EditRequest
from server.facts.forgetting_results import ForgetReport
from server.facts.guard import Goal, Guard
from server.facts.history_results import Audit
from server.facts.ids import expanded
from server.facts.previews import Previews
from server.facts.queries import Forget
from server.facts.results import EditReport, MethodInfo, MethodLine, MethodList, RevertReport
from server.methods import editor_named
from server.request_context import RequestContext
from server.transaction.workspace import Workspace


class EditService:
    """Corrections of facts. Every call that uses the model takes its lock."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._previews: Previews[Previewed] = Previews()

    def preview(
        self,
        edits: Sequence[Edit],
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        explain: bool = False,
        goal: Goal = "everywhere",
        partial: bool = False,
        ctx: RequestContext | None = None,
    ) -> EditReport:
        """The report of apply, with nothing kept. Active edits in conflict count as replaced.

        `explain` adds the known facts that lie near the edits.
        """
        request = EditRequest(
            edits, method, params, guard, replace=True, explain=explain, goal=goal, partial=partial
        )
        with self._workspace.turn(ctx):
            return applying.preview(self._workspace, request, ctx or RequestContext(), self._previews)

    def apply(
        self,
        edits: Sequence[Edit] = (),
        method: str = "auto",
        params: dict[str, Any] | None = None,
        guard: Guard | None = None,
        replace: bool = False,
        reason: str | None = None,
        source: str | None = None,
        goal: Goal = "everywhere",
        partial: bool = False,
        preview_id: str | None = None,
        recompute: bool = False,
        ctx: RequestContext | None = None,
    ) -> EditReport:
        """One transaction: computed, applied, measured, and kept only if the guard's bounds hold.

        With `preview_id`, what that preview computed is kept as it is; the edits need not be given again. Where the
        model has changed since, it is an error, or with `recompute` computed again.
        """
        request = EditRequest(
            edits, method, params, guard, replace, reason, source, goal=goal, partial=partial
        )
        ctx = ctx or RequestContext()
        if preview_id is None:
            if not edits:
                raise ServiceError(
                    "`edits` is required and was not given; name edits, or the preview_id of a preview"
                )
            with self._workspace.turn(ctx):
                return applying.apply(self._workspace, request, ctx)
        kept = self._previews.get(preview_id)
        request = as_previewed(request, kept.request)
        with self._workspace.turn(ctx):
            if recompute and self._workspace.state_hash != kept.state_hash:
                report = applying.apply(self._workspace, request, ctx)
            else:
                report = applying.apply_previewed(self._workspace, kept, request, ctx)
        if report.status == "applied":
            self._previews.applied(preview_id, report.edit_ids)
        return report

    def revert(
        self, edit_ids: Sequence[str], reason: str | None = None, ctx: RequestContext | None = None
    ) -> RevertReport:
        """Take edits back, in any order."""
        with self._workspace.turn(ctx):
            return editing.revert(self._workspace, expanded(edit_ids), reason, ctx or RequestContext())

    def reapply(
        self, edit_ids: Sequence[str], reason: str | None = None, ctx: RequestContext | None = None
    ) -> EditReport:
        """Bring edits back from their stored patches."""
        with self._workspace.turn(ctx):
            return editing.reapply(self._workspace, expanded(edit_ids), reason, ctx or RequestContext())

    def audit(
        self,
        edit_ids: Sequence[str] | None = None,
        repair: bool = False,
        fluency: bool = False,
        ctx: RequestContext | None = None,
        full: bool = False,
    ) -> Audit:
        """Whether active edits still hold, and whether ledger, files and live weights agree. `full`: in every form."""
        ids = None if edit_ids is None else expanded(edit_ids)
        with self._workspace.turn(ctx):
            return auditing.audit(self._workspace, ids, repair, ctx or RequestContext(), fluency, full)

    def forget(
        self,
        facts: Sequence[Forget],
        goal: Goal = "everywhere",
        max_said: float = 0.0,
        reason: str | None = None,
        source: str | None = None,
        ctx: RequestContext | None = None,
    ) -> ForgetReport:
        """Suppress facts without another answer in their place, in one transaction."""
        with self._workspace.turn(ctx):
            return forgetting.forget(
                self._workspace,
                facts,
                goal,
                max_said,
                reason,
                source,
                ctx or RequestContext(),
                self._previews,
            )

    def explain(
        self,
        prompt: str,
        chat: bool | None = None,
        max_new_tokens: int = 12,
        limit: int = 5,
        ctx: RequestContext | None = None,
    ) -> Explanation:
        """Which active edits make the model answer a prompt as it does. The model stays as it is."""
        with self._workspace.turn(ctx):
            return explaining.explain(
                self._workspace, prompt, chat, max_new_tokens, limit, ctx or RequestContext()
            )

    def methods(self, name: str | None = None) -> MethodList:
        """Every method in short; or all about one, with the schema of its parameters and this model's defaults.

        Raises ServiceError for a name that is not known.
        """
        if name == AUTO:
            return MethodList(methods=[], auto=RULE)
        if name is not None:
            return MethodList(methods=[self.method(name)], auto=RULE)
        kept = set(MethodLine.model_fields)
        lines = [MethodLine(**self.method(each).model_dump(include=kept)) for each in sorted(METHODS)]
        return MethodList(methods=[*lines], auto=RULE)

    def needs_of(self, name: str) -> list[str]:
        """What a method still needs before it can be used here; a refusal if it never can."""
        editor, lm = METHODS[name], self._workspace.lm
        refusal = editor.supports(lm)
        return [refusal] if refusal else editor.needs(lm, self._workspace.edit_context(RequestContext()))

    def method(self, name: str) -> MethodInfo:
        """All about one method. Raises ServiceError for a name that is not known."""
        editor, needs = editor_named(name), self.needs_of(name)
        return MethodInfo(
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
            exportable=editor.exportable,
            params=editor.schema(self._workspace.lm),
        )
