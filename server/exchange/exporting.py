"""Write active edits to files: as a LoRA adapter, as a whole model, or as a bundle for another Errata."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from editors import METHODS
from editors.finetune.peft_format import CONFIG, WEIGHTS, Adapter, as_adapter
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM
from editors.patch import join_deltas
from server.errors import ServiceError
from server.exchange.bundle import write_bundle
from server.exchange.files import (
    ExportedFiles,
    check_name,
    folder,
    need_room,
    new_entry,
    publish_file,
    publish_folder,
    refuse_existing,
    remove_entry,
)
from server.exchange.model_card import RANKS, about, card
from server.exchange.results import ExportReport, Format
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, who
from store import EditRecord

SHARD = "5GB"
COMPARED_PROMPTS = 20  # on which an adapter's logits are compared with the live model's


@dataclass(frozen=True)
class Selection:
    """The edits to export, in ledger order, and the stack as if only they were active."""

    edits: list[EditRecord]
    stack: list[ActivePatch]


@dataclass(frozen=True)
class AdapterFacts:
    """What the report says about an adapter; empty for the other formats."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    recompression_error: float | None = None
    max_logit_difference: float | None = None

    @property
    def rank(self) -> int | None:
        """The greatest rank of a weight's change; None when no adapter was written."""
        return max(self.ranks.values(), default=None)


def export(
    workspace: Workspace,
    format: Format,
    name: str,
    edit_ids: Sequence[str] | None,
    max_rank: int | None,
    ctx: RequestContext,
    shard: str = SHARD,
) -> ExportReport:
    """Write some active edits (all by default) under HOME/exports, where nothing is ever overwritten.

    Raises ServiceError for a name, a selection or a format that cannot be; then nothing is left behind.
    """
    started = time.monotonic()
    check_name(name)
    if max_rank is not None and format != "lora":
        raise ServiceError(f'max_rank is for format "lora"; {format} takes the edits as they are')
    suffix = ".zip" if format == "patches" else ""
    target = folder(workspace.settings.home, "exports") / f"{name}{suffix}"
    refuse_existing(target)
    selection = select(workspace, edit_ids)
    _refuse_unfit(selection, format)
    with Transaction(workspace) as tx:
        tx.stage(selection.stack)
        weights_hash = workspace.host.weights_hash
        ctx.report(0.1, 1.0, f"writing {name}")
        with new_entry(workspace.settings.home, name) as scratch:
            adapter = AdapterFacts()
            if format == "patches":
                names = write_bundle(scratch / target.name, workspace, selection.edits, selection.stack)
                files = publish_file(scratch / target.name, target, names)
            else:
                if format == "lora":
                    adapter = _write_adapter(workspace, selection, scratch, max_rank)
                else:
                    _write_model(workspace.lm, scratch, shard)
                _write_description(workspace, name, selection.edits, weights_hash, adapter.rank, scratch)
                ctx.check()
                files = publish_folder(scratch, target)
    report = _report(workspace, format, selection, files, weights_hash, adapter, started)
    try:
        _record(workspace, report, name, ctx)
    except BaseException:
        remove_entry(target)  # what the ledger does not know is not there
        raise
    return report


def select(workspace: Workspace, edit_ids: Sequence[str] | None) -> Selection:
    """The active edits asked for. Raises ServiceError when one is not active, or there is none."""
    active = workspace.active_edits
    stack = list(workspace.host.stack)
    if edit_ids is not None:
        known = {edit.id for edit in active}
        wanted = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
        for record in wanted:
            if record.id not in known:
                raise ServiceError(
                    f"{record.id} is {record.status} or of another model, so it cannot be exported; reapply_edits "
                    "brings it back, list_edits(status='active') shows what can be exported"
                )
        ids = {edit.id for edit in wanted}
        stack = without(workspace, [edit for edit in active if edit.id not in ids]).stack
        active = [edit for edit in active if edit.id in ids]
    if not active:
        raise ServiceError("no edit is active, so there is nothing to export; apply_edits first")
    return Selection(active, stack)


def _refuse_unfit(selection: Selection, format: Format) -> None:
    """Raise ServiceError that names the edits a format cannot hold: memories, live adapters, steering."""
    if format == "patches":
        unfit = {a.patch_id for a in selection.stack if a.method not in METHODS}
        why = "no edits of facts and do not go into a bundle; set_steering(name, 0) switches steering off"
    else:
        unfit = {a.patch_id for a in selection.stack if a.patch.kind != "weight"}
        why = f'beside the weights and cannot be exported as {format}; format="patches" takes memories along'
    names = [f"{edit.id} ({edit.method})" for edit in selection.edits if edit.patch_id in unfit]
    if names:
        others = [edit.id for edit in selection.edits if edit.patch_id not in unfit]
        rest = f"; or name the others: edit_ids={others!r}" if others else ""
        raise ServiceError(f"{', '.join(names)}: {why}{rest}")


def _write_adapter(
    workspace: Workspace, selection: Selection, scratch: Path, max_rank: int | None
) -> AdapterFacts:
    """Write the exact sum of the edits as a PEFT adapter, cut to `max_rank` where one is given."""
    deltas = join_deltas([active.patch for active in selection.stack])
    adapter = as_adapter(workspace.lm, deltas, workspace.lm.name, max_rank)
    (scratch / WEIGHTS).write_bytes(safetensors.torch.save(adapter.tensors, metadata={"format": "pt"}))
    (scratch / CONFIG).write_text(_json(adapter.config), "utf-8")
    workspace.lm.tokenizer.save_pretrained(scratch)
    prompts = [edit.prompt for edit in selection.edits[:COMPARED_PROMPTS]]
    return AdapterFacts(
        ranks=adapter.ranks,
        recompression_error=max(adapter.errors.values()) if max_rank is not None else None,
        max_logit_difference=_logit_difference(workspace, adapter, prompts),
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


@torch.no_grad()
def _logits(lm: LM, prompts: Sequence[str]) -> Tensor:
    """Next-token logits at every token of some prompts: (tokens, vocabulary), float32."""
    inputs = answer_inputs(lm, [(lm.encode(lm.prompt(prompt))[0], ()) for prompt in prompts])
    logits: Tensor = lm.model(**inputs.call).logits[inputs.mask.bool()]
    return logits.float()


def _logit_difference(workspace: Workspace, adapter: Adapter, prompts: Sequence[str]) -> float:
    """Greatest difference of logits between the live model and the pristine one with the adapter."""
    live = _logits(workspace.lm, prompts)
    deltas = {name: [delta] for name, delta in adapter.deltas.items()}
    with workspace.host.pristine(), workspace.lm.patched(deltas):
        return float((_logits(workspace.lm, prompts) - live).abs().max())


def _write_model(lm: LM, scratch: Path, shard: str) -> None:
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    need_room(scratch, size)
    lm.model.save_pretrained(scratch, max_shard_size=shard)
    lm.tokenizer.save_pretrained(scratch)


def _write_description(
    workspace: Workspace,
    name: str,
    edits: Sequence[EditRecord],
    weights_hash: str,
    rank: int | None,
    scratch: Path,
) -> None:
    """README.md for people, errata.json for machines."""
    (scratch / "README.md").write_text(card(workspace, name, edits, weights_hash, rank), "utf-8")
    (scratch / "errata.json").write_text(_json(about(workspace, edits, weights_hash)), "utf-8")


def _report(
    workspace: Workspace,
    format: Format,
    selection: Selection,
    files: ExportedFiles,
    weights_hash: str,
    adapter: AdapterFacts,
    started: float,
) -> ExportReport:
    return ExportReport(
        path=str(files.path),
        format=format,
        files=files.names,
        bytes=files.bytes,
        sha256=files.sha256,
        edit_ids=[edit.id for edit in selection.edits],
        base_hash=workspace.host.base_hash,
        weights_hash=weights_hash,
        ranks=dict(adapter.ranks),
        recompression_error=adapter.recompression_error,
        max_logit_difference=adapter.max_logit_difference,
        seconds=time.monotonic() - started,
        warnings=_warnings(workspace, adapter),
        next=_next(workspace, format, files, adapter),
    )


def _warnings(workspace: Workspace, adapter: AdapterFacts) -> list[str]:
    if adapter.rank is None:
        return []
    warnings = []
    if adapter.rank > RANKS[-1]:
        warnings.append(
            f"the rank is {adapter.rank}, and vLLM takes at most {RANKS[-1]}; export with max_rank={RANKS[-1]}, "
            "or as merged"
        )
    if adapter.recompression_error:
        warnings.append(
            f"max_rank left out up to {adapter.recompression_error:.1%} of a weight's change; check the facts with "
            "the adapter on"
        )
    if workspace.lm.dtype != torch.float32:
        warnings.append(
            f"the live weights are rounded to {str(workspace.lm.dtype).removeprefix('torch.')} and an adapter is not, "
            "so logits differ a little; merged is exact"
        )
    return warnings


def _next(workspace: Workspace, format: Format, files: ExportedFiles, adapter: AdapterFacts) -> str:
    path = files.path
    if format == "patches":
        return f"Put {path.name} into HOME/imports of an Errata with the same model and call import_patches."
    if adapter.rank is None:
        return f"AutoModel...from_pretrained({str(path)!r}), or vllm serve {path}."
    fitting = next((rank for rank in RANKS if rank >= adapter.rank), adapter.rank)
    return (
        f"peft.PeftModel.from_pretrained(base, {str(path)!r}), or vllm serve {workspace.lm.name} --enable-lora "
        f"--max-lora-rank {fitting} --lora-modules {path.name}={path}"
    )


def _record(workspace: Workspace, report: ExportReport, name: str, ctx: RequestContext) -> None:
    """Keep the export on the ledger, unless nothing may be written there."""
    if workspace.read_only:
        return
    payload = {"format": report.format, "name": name, "sha256": report.sha256, "bytes": report.bytes}
    workspace.ledger.record_event(
        "exported", payload, who(ctx), model_id=workspace.model_id, edit_ids=report.edit_ids
    )
