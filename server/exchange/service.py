"""The service of exchange: export edits, import bundles and adapters."""

from __future__ import annotations

from collections.abc import Sequence

from editors.edit import Edit
from server.exchange import exporting, importing
from server.exchange.results import ExportReport, Format, GgufType, ImportReport
from server.exchange.taking_in import Wishes
from server.facts.guard import Guard
from server.request_context import RequestContext
from server.transaction.workspace import Workspace


class ExchangeService:
    """Edits out to files and in from files. Every call takes the model's lock."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def export_edits(
        self,
        format: Format,
        name: str,
        edit_ids: Sequence[str] | None = None,
        max_rank: int | None = None,
        ctx: RequestContext | None = None,
        *,
        gguf_type: GgufType | None = None,
        with_base: bool = False,
    ) -> ExportReport:
        """Write active edits (all by default) under HOME/exports."""
        with self._workspace.turn(ctx):
            return exporting.export(
                self._workspace,
                format,
                name,
                edit_ids,
                max_rank,
                ctx or RequestContext(),
                gguf_type=gguf_type,
                with_base=with_base,
            )

    def import_patches(
        self,
        path: str,
        reason: str | None = None,
        ctx: RequestContext | None = None,
        *,
        guard: Guard | None = None,
        dry_run: bool = False,
    ) -> ImportReport:
        """Replay a bundle made on the same base model."""
        wishes = Wishes(reason, guard, dry_run)
        with self._workspace.turn(ctx):
            return importing.import_patches(self._workspace, path, wishes, ctx or RequestContext())

    def import_adapter(
        self,
        path: str,
        edits: Sequence[Edit] = (),
        reason: str | None = None,
        source: str | None = None,
        ctx: RequestContext | None = None,
        *,
        guard: Guard | None = None,
        dry_run: bool = False,
    ) -> ImportReport:
        """Take in a PEFT adapter as the patch of some edits, or of none that is named."""
        wishes = Wishes(reason, guard, dry_run)
        with self._workspace.turn(ctx):
            return importing.import_adapter(
                self._workspace, path, edits, source, wishes, ctx or RequestContext()
            )
