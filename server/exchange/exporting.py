"""Write active edits to files: as an adapter or a whole model (PEFT and Hugging Face, or GGUF), or as a bundle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from editors import METHODS
from server.errors import ServiceError
from server.exchange.bundle import write_bundle
from server.exchange.distillation import Distillation
from server.exchange.distilling import distilled, refuse_untaught
from server.exchange.export_report import export_report
from server.exchange.facts_file import write_facts
from server.exchange.files import (
    check_name,
    folder,
    new_entry,
    publish_file,
    publish_folder,
    refuse_existing,
    remove_entry,
)
from server.exchange.formats import (
    AdapterFacts,
    Selection,
    json_text,
    loadable_base,
    refuse_quantised,
    write_adapter,
    write_base,
    write_gguf_adapter,
    write_gguf_model,
    write_merged,
)
from server.exchange.model_card import BASE, about, card
from server.exchange.results import ExportReport, Format, GgufType
from server.facts.ids import expanded
from server.request_context import RequestContext
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import STATES_NO_FACT, Workspace, who
from store import EditRecord

SHARD = "5GB"
SUFFIX = {"patches": ".zip", "gguf_lora": ".gguf", "gguf": ".gguf"}  # of the formats that are one file
ADAPTERS = ("lora", "gguf_lora")


def export(
    workspace: Workspace,
    format: Format,
    name: str,
    edit_ids: Sequence[str] | None,
    max_rank: int | None,
    ctx: RequestContext,
    shard: str = SHARD,
    gguf_type: GgufType | None = None,
    with_base: bool = False,
) -> ExportReport:
    """Write some active edits (all by default) under HOME/exports, where nothing is ever overwritten.

    Args:
        max_rank: of an adapter's change of one weight; None is exact.
        shard: greatest size of one file of a merged model.
        gguf_type: how the matrices of a GGUF model are stored; None is f16.
        with_base: beside an adapter (lora) write the base model too, as NAME/base, and name it `base` there, so that
            the folder can be moved.

    Raises ServiceError for a name, a selection or a format that cannot be; then nothing is left behind.
    """
    started = time.monotonic()
    target = _target(workspace, format, name, max_rank, gguf_type, with_base)
    selection = select(workspace, edit_ids)
    if with_base:
        selection = replace(selection, base=BASE)
    _refuse_unfit(workspace, selection, format)
    selection, taught = _as_weights(workspace, selection, format, ctx)
    with Transaction(workspace) as tx:
        tx.stage(selection.stack)
        weights_hash = workspace.host.weights_hash
        ctx.report(0.1, 1.0, f"writing {name}")
        with new_entry(workspace.settings.home, name) as scratch:
            if format in SUFFIX:
                file = scratch / target.name
                adapter, names = _write_file(
                    workspace, format, selection, weights_hash, file, max_rank, gguf_type, ctx
                )
                ctx.check()
                files = publish_file(file, target, names)
            else:
                adapter = _write_folder(workspace, format, selection, scratch, max_rank, shard)
                if with_base:
                    write_base(workspace, scratch / BASE, shard)
                ctx.check()
                rank = 0 if format == "facts" else adapter.rank
                _write_description(workspace, name, selection, weights_hash, rank, scratch)
                files = publish_folder(scratch, target)
    if with_base:
        selection = replace(selection, base=str(target / BASE))
    report = export_report(workspace, format, selection, files, weights_hash, adapter, started, taught)
    try:
        _record(workspace, report, name, ctx)
    except BaseException:
        remove_entry(target)  # an export that is not on the ledger is removed
        raise
    return report


def _target(
    workspace: Workspace,
    format: Format,
    name: str,
    max_rank: int | None,
    gguf_type: GgufType | None,
    with_base: bool,
) -> Path:
    """Where the export goes. Raises ServiceError for a name, options or a model that cannot be exported so."""
    check_name(name)
    _refuse_options(format, max_rank, gguf_type, with_base)
    if format in ("merged", "gguf"):
        refuse_quantised(workspace, f"exported as {format}")
    if with_base and workspace.lm.quantisation is not None:
        raise ServiceError(
            f"the base model is here only as {workspace.lm.quantisation} weights and cannot be written beside the "
            "adapter; leave out with_base"
        )
    target = folder(workspace.settings.home, "exports") / f"{name}{SUFFIX.get(format, '')}"
    refuse_existing(target)
    return target


def _refuse_options(
    format: Format, max_rank: int | None, gguf_type: GgufType | None, with_base: bool
) -> None:
    if max_rank is not None and format not in ADAPTERS:
        raise ServiceError(
            f'max_rank is for format "lora" or "gguf_lora"; {format} takes the edits as they are'
        )
    if gguf_type is not None and format != "gguf":
        raise ServiceError(f'gguf_type is for format "gguf"; leave it out for {format}')
    if with_base and format != "lora":
        raise ServiceError(f'with_base is for format "lora"; leave it out for {format}')


def _write_folder(
    workspace: Workspace,
    format: Format,
    selection: Selection,
    scratch: Path,
    max_rank: int | None,
    shard: str,
) -> AdapterFacts:
    """Write an export that is a folder."""
    if format == "lora":
        return write_adapter(workspace, selection, scratch, max_rank)
    if format == "facts":
        return AdapterFacts(said=write_facts(workspace, selection.edits, scratch))
    write_merged(workspace.lm, scratch, shard)
    return AdapterFacts()


def _write_file(
    workspace: Workspace,
    format: Format,
    selection: Selection,
    weights_hash: str,
    file: Path,
    max_rank: int | None,
    gguf_type: GgufType | None,
    ctx: RequestContext,
) -> tuple[AdapterFacts, list[str]]:
    """Write a format that is one file; returns the report's facts about an adapter, and the names in the file."""
    if format == "patches":
        return AdapterFacts(), write_bundle(file, workspace, selection.edits, selection.stack)
    if format == "gguf_lora":
        return write_gguf_adapter(workspace, selection, weights_hash, file, max_rank), [file.name]
    write_gguf_model(workspace, selection, weights_hash, file, gguf_type, ctx)
    return AdapterFacts(), [file.name]


def select(workspace: Workspace, edit_ids: Sequence[str] | None) -> Selection:
    """The active edits asked for. Raises ServiceError when one is not active, or there is none."""
    active = workspace.active_edits
    stack = list(workspace.host.stack)
    if edit_ids is not None:
        known = {edit.id for edit in active}
        wanted = workspace.ledger.edits(list(dict.fromkeys(expanded(edit_ids))))
        for record in wanted:
            if record.id not in known:
                raise ServiceError(_not_active(workspace, record))
        ids = {edit.id for edit in wanted}
        stack = without(workspace, [edit for edit in active if edit.id not in ids]).stack
        active = [edit for edit in active if edit.id in ids]
    if not active:
        raise ServiceError("no edit is active, so there is nothing to export; apply_edits first")
    return Selection(active, stack, loadable_base(workspace))


def _not_active(workspace: Workspace, record: EditRecord) -> str:
    """Why an edit that is not active here cannot be exported, and what to do."""
    shown = "list_edits(status='active') shows what can be exported"
    if record.model_id != workspace.model_id:
        return (
            f"{record.id} belongs to another model than the one that runs, so it cannot be exported; {shown}"
        )
    return (
        f"{record.id} is {record.status}, so it is not in the model and cannot be exported; "
        f"reapply_edits({[record.id]!r}) makes it active again, {shown}"
    )


def _refuse_unfit(workspace: Workspace, selection: Selection, format: Format) -> None:
    """Raise ServiceError that names the edits a format cannot hold: live adapters, steering, memories."""
    if format not in ("patches", "facts"):
        if beside := _beside(selection):
            refuse_untaught(workspace, beside)
        return
    unfit = {a.patch_id for a in selection.stack if a.method not in METHODS}
    unfit |= {edit.patch_id for edit in selection.edits if edit.request.get(STATES_NO_FACT)}
    names = [f"{edit.id} ({edit.method})" for edit in selection.edits if edit.patch_id in unfit]
    if names:
        others = [edit.id for edit in selection.edits if edit.patch_id not in unfit]
        rest = f"; or name the others: edit_ids={others!r}" if others else ""
        raise ServiceError(
            f"{', '.join(names)}: are not edits of facts and cannot be written as {format}; set_steering(name, "
            f"0) switches "
            f"steering off, and an adapter is passed on as its own folder{rest}"
        )


def _beside(selection: Selection) -> list[EditRecord]:
    """The edits that act beside the weights."""
    beside = {a.patch_id for a in selection.stack if a.acts_beside}
    return [edit for edit in selection.edits if edit.patch_id in beside]


def _as_weights(
    workspace: Workspace, selection: Selection, format: Format, ctx: RequestContext
) -> tuple[Selection, Distillation | None]:
    """The selection with its memories as weights, where the format holds weights alone."""
    beside = _beside(selection) if format not in ("patches", "facts") else []
    if not beside:
        return selection, None

    def report(done: float) -> None:
        ctx.check()
        ctx.report(0.1 * done, 1.0, "teaching memories to the weights")

    ids = {edit.patch_id for edit in beside}
    plain = [active for active in selection.stack if active.patch_id not in ids]
    made = distilled(workspace, beside, plain, report)
    return replace(selection, stack=[*plain, made.patch]), made.report


def _write_description(
    workspace: Workspace,
    name: str,
    selection: Selection,
    weights_hash: str,
    rank: int | None,
    scratch: Path,
) -> None:
    """README.md for people, errata.json for machines."""
    edits = selection.edits
    text = card(workspace, name, selection.base, edits, weights_hash, rank)
    (scratch / "README.md").write_text(text, "utf-8")
    (scratch / "errata.json").write_text(json_text(about(workspace, edits, weights_hash)), "utf-8")


def _record(workspace: Workspace, report: ExportReport, name: str, ctx: RequestContext) -> None:
    """Keep the export on the ledger, unless nothing may be written there."""
    if workspace.read_only:
        return
    payload = {"format": report.format, "name": name, "sha256": report.sha256, "bytes": report.bytes}
    workspace.ledger.record_event(
        "exported", payload, who(ctx), model_id=workspace.model_id, edit_ids=report.edit_ids
    )
