"""Edits that leave the house: as a LoRA adapter, as a whole model, or as a bundle for another Errata."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from editors import METHODS
from editors.finetune.peft_format import CONFIG, WEIGHTS, Adapter, as_adapter
from editors.model.lm import LM
from editors.patch import join_deltas
from server.errors import ServiceError
from server.exchange.bundle import write_bundle
from server.exchange.files import (
    Written,
    check_name,
    folder,
    need_room,
    new_entry,
    publish_file,
    publish_folder,
    refuse_existing,
)
from server.exchange.model_card import RANKS, about, card
from server.exchange.results import ExportReport, Format
from server.facts.editing import without
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, who
from store import EditRecord

SHARD = "5GB"


@dataclass(frozen=True)
class Chosen:
    """What leaves: the edits in ledger order, and the stack as if only they were active."""

    edits: list[EditRecord]
    stack: list[ActivePatch]


def export(
    workspace: Workspace,
    format: Format,
    name: str,
    edit_ids: Sequence[str] | None,
    max_rank: int | None,
    ctx: RequestContext,
    shard: str = SHARD,
) -> ExportReport:
    """Write the chosen active edits (all by default) under HOME/exports; nothing there is ever overwritten.

    Raises WorkbenchError for a name, a choice or a format that cannot be; then nothing is left behind.
    """
    started = time.monotonic()
    check_name(name)
    if max_rank is not None and format != "lora":
        raise ServiceError(f'max_rank is for format "lora"; {format} takes the edits as they are')
    suffix = ".zip" if format == "patches" else ""
    target = folder(workspace.settings.home, "exports") / f"{name}{suffix}"
    refuse_existing(target)
    chosen = choose(workspace, edit_ids)
    _refuse_unfit(chosen, format)
    with workspace.host.trial(chosen.stack):
        weights_hash = workspace.host.weights_hash
        ctx.progress(0.1, 1.0, f"writing {name}")
        ctx.check()
        with new_entry(workspace.settings.home, name) as scratch:
            extra: dict[str, Any] = {}
            if format == "patches":
                names = write_bundle(scratch / target.name, workspace, chosen.edits, chosen.stack)
                written = publish_file(scratch / target.name, target, names)
            else:
                rank = None
                if format == "lora":
                    adapter, extra = _write_adapter(workspace, chosen, scratch, max_rank)
                    rank = max(adapter.ranks.values())
                else:
                    _write_model(workspace.lm, scratch, shard)
                (scratch / "README.md").write_text(
                    card(workspace, name, chosen.edits, weights_hash, rank), "utf-8"
                )
                facts = about(workspace, chosen.edits, weights_hash)
                (scratch / "errata.json").write_text(_pretty(facts), "utf-8")
                ctx.check()
                written = publish_folder(scratch, target)
    report = _report(workspace, format, chosen, written, weights_hash, extra, started)
    _note(workspace, report, name, ctx)
    return report


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def choose(workspace: Workspace, edit_ids: Sequence[str] | None) -> Chosen:
    """The active edits asked for. Raises WorkbenchError when one is not active, or there is none."""
    active = workspace.ledger.active_edits(workspace.model_id) if workspace.model_id is not None else []
    if edit_ids is not None:
        wanted = workspace.ledger.edits(list(dict.fromkeys(edit_ids)))
        known = {e.id for e in active}
        for record in wanted:
            if record.id not in known:
                raise ServiceError(
                    f"{record.id} is {record.status} or of another model, so it cannot be exported; reapply_edits "
                    "brings it back, list_edits(status='active') shows what can be exported"
                )
        ids = {e.id for e in wanted}
        rest = [e for e in active if e.id not in ids]
        active = [e for e in active if e.id in ids]
        stack, _ = without(workspace, rest)
    else:
        stack = list(workspace.host.stack)
    if not active:
        raise ServiceError("no edit is active, so there is nothing to export; apply_edits first")
    return Chosen(active, stack)


def _refuse_unfit(chosen: Chosen, format: Format) -> None:
    """Raise WorkbenchError naming what a format cannot hold: what is beside the weights, and steering."""
    if format == "patches":
        unfit = {a.patch_id for a in chosen.stack if a.method not in METHODS}
        why = "no edits of facts and do not leave in a bundle; set_steering(name, 0) switches steering off"
    else:
        unfit = {a.patch_id for a in chosen.stack if a.patch.kind != "weight"}
        why = f'beside the weights and cannot be exported as {format}; format="patches" takes memories along'
    names = [f"{e.id} ({e.method})" for e in chosen.edits if e.patch_id in unfit]
    if names:
        others = [e.id for e in chosen.edits if e.patch_id not in unfit]
        rest = f"; or name the others: edit_ids={others!r}" if others else ""
        raise ServiceError(f"{', '.join(names)}: {why}{rest}")


def _write_adapter(
    workspace: Workspace, chosen: Chosen, scratch: Any, max_rank: int | None
) -> tuple[Adapter, dict[str, Any]]:
    deltas = join_deltas([a.patch for a in chosen.stack])
    adapter = as_adapter(workspace.lm, deltas, workspace.lm.name, max_rank)
    header = {"format": "pt"}
    (scratch / WEIGHTS).write_bytes(safetensors.torch.save(adapter.tensors, metadata=header))
    (scratch / CONFIG).write_text(_pretty(adapter.config), "utf-8")
    workspace.lm.tokenizer.save_pretrained(scratch)
    worst = max(adapter.errors.values())
    difference = _difference(workspace, adapter, [e.prompt for e in chosen.edits[:20]])
    return adapter, {
        "ranks": adapter.ranks,
        "recompression_error": worst if max_rank is not None else None,
        "max_logit_difference": difference,
    }


@torch.no_grad()
def _logits(lm: LM, prompts: Sequence[str]) -> Tensor:
    """Next-token logits at every token of some prompts."""
    ids, mask = lm.pad([lm.encode(lm.prompt(p))[0] for p in prompts])
    if lm.is_seq2seq:
        start = torch.full_like(ids[:, :1], lm.model.config.decoder_start_token_id)
        found: Tensor = lm.model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits
        return found.float()
    logits: Tensor = lm.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    return logits.float()


def _difference(workspace: Workspace, adapter: Adapter, prompts: Sequence[str]) -> float:
    """Greatest difference of logits between the live model and the pristine one with the adapter."""
    live = _logits(workspace.lm, prompts)
    with workspace.host.pristine(), workspace.lm.patched({name: [d] for name, d in adapter.deltas.items()}):
        return float((_logits(workspace.lm, prompts) - live).abs().max())


def _write_model(lm: LM, scratch: Any, shard: str) -> None:
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    need_room(scratch, size)
    lm.model.save_pretrained(scratch, max_shard_size=shard)
    lm.tokenizer.save_pretrained(scratch)


def _report(
    workspace: Workspace,
    format: Format,
    chosen: Chosen,
    written: Written,
    weights_hash: str,
    extra: dict[str, Any],
    started: float,
) -> ExportReport:
    return ExportReport(
        path=str(written.path),
        format=format,
        files=written.files,
        bytes=written.bytes,
        sha256=written.sha256,
        edit_ids=[e.id for e in chosen.edits],
        base_hash=workspace.host.base_hash,
        weights_hash=weights_hash,
        seconds=time.monotonic() - started,
        warnings=_warnings(workspace, extra),
        next=_next(workspace, format, written, extra),
        **extra,
    )


def _warnings(workspace: Workspace, extra: dict[str, Any]) -> list[str]:
    found = []
    rank = max(extra.get("ranks", {"": 0}).values())
    if rank > RANKS[-1]:
        found.append(
            f"the rank is {rank}, and vLLM takes at most {RANKS[-1]}; export with max_rank={RANKS[-1]}, or as merged"
        )
    if extra.get("recompression_error"):
        found.append(
            f"max_rank left out up to {extra['recompression_error']:.1%} of a weight's change; check the facts with "
            "the adapter on"
        )
    if extra and workspace.lm.dtype != torch.float32:
        found.append(
            f"the live weights are rounded to {str(workspace.lm.dtype).removeprefix('torch.')} and an adapter is not, "
            "so logits differ a little; merged is exact"
        )
    return found


def _next(workspace: Workspace, format: Format, written: Written, extra: dict[str, Any]) -> str:
    if format == "patches":
        return f"Put {written.path.name} into HOME/imports of an Errata with the same model and call import_patches."
    if format == "merged":
        return f"AutoModel...from_pretrained({str(written.path)!r}), or vllm serve {written.path}."
    rank = max(extra["ranks"].values())
    fitting = next((r for r in RANKS if r >= rank), rank)
    return (
        f"peft.PeftModel.from_pretrained(base, {str(written.path)!r}), or vllm serve {workspace.lm.name} --enable-lora "
        f"--max-lora-rank {fitting} --lora-modules {written.path.name}={written.path}"
    )


def _note(workspace: Workspace, report: ExportReport, name: str, ctx: RequestContext) -> None:
    if workspace.read_only:
        return
    told = {"format": report.format, "name": name, "sha256": report.sha256, "bytes": report.bytes}
    workspace.ledger.record_event(
        "exported", told, who(ctx), model_id=workspace.model_id, edit_ids=report.edit_ids
    )
