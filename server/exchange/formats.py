"""Write the selected edits in each format: PEFT and GGUF adapters, Hugging Face and GGUF models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from editors.finetune.peft_format import CONFIG, WEIGHTS, Adapter, as_adapter
from editors.model.answer_inputs import answer_inputs
from editors.model.lm import LM
from editors.patch import join_deltas
from server.errors import ServiceError
from server.exchange.files import need_room
from server.exchange.gguf_files import write_lora, write_model
from server.exchange.model_card import about
from server.exchange.results import GgufType
from server.models.loading import source_gguf
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace
from store import EditRecord

COMPARED_PROMPTS = 20  # on which an adapter's logits are compared with the live model's


@dataclass(frozen=True)
class Selection:
    """The edits to export, in ledger order, and the stack as if only they were active."""

    edits: list[EditRecord]
    stack: list[ActivePatch]
    base: str  # what loads the base model where the export is used


@dataclass(frozen=True)
class AdapterFacts:
    """What the report says about an adapter; empty for the other formats."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    recompression_error: float | None = None
    max_logit_difference: float | None = None
    said: float | None = None

    @property
    def rank(self) -> int | None:
        """The greatest rank of a weight's change; None when no adapter was written."""
        return max(self.ranks.values(), default=None)


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def write_adapter(
    workspace: Workspace, selection: Selection, scratch: Path, max_rank: int | None
) -> AdapterFacts:
    """Write the exact sum of the edits as a PEFT adapter, cut to `max_rank` where one is given."""
    adapter = _adapter(workspace, selection, max_rank)
    (scratch / WEIGHTS).write_bytes(safetensors.torch.save(adapter.tensors, metadata={"format": "pt"}))
    (scratch / CONFIG).write_text(json_text(adapter.config), "utf-8")
    workspace.lm.tokenizer.save_pretrained(scratch)
    return _adapter_facts(workspace, selection, adapter, max_rank)


def _adapter(workspace: Workspace, selection: Selection, max_rank: int | None) -> Adapter:
    deltas = join_deltas([active.patch for active in selection.stack])
    return as_adapter(workspace.lm, deltas, selection.base, max_rank)


def _adapter_facts(
    workspace: Workspace, selection: Selection, adapter: Adapter, max_rank: int | None
) -> AdapterFacts:
    prompts = [edit.prompt for edit in selection.edits[:COMPARED_PROMPTS]]
    return AdapterFacts(
        ranks=adapter.ranks,
        recompression_error=max(adapter.errors.values()) if max_rank is not None else None,
        max_logit_difference=_logit_difference(workspace, adapter, prompts),
    )


def write_gguf_adapter(
    workspace: Workspace, selection: Selection, weights_hash: str, file: Path, max_rank: int | None
) -> AdapterFacts:
    """Write the exact sum of the edits as llama.cpp's LoRA, cut to `max_rank` where one is given."""
    adapter = _adapter(workspace, selection, max_rank)
    write_lora(workspace.lm, adapter.deltas, about(workspace, selection.edits, weights_hash), file)
    return _adapter_facts(workspace, selection, adapter, max_rank)


def write_gguf_model(
    workspace: Workspace,
    selection: Selection,
    weights_hash: str,
    file: Path,
    gguf_type: GgufType | None,
    ctx: RequestContext,
) -> None:
    """Write the model with the edits as GGUF. Raises ServiceError unless it was loaded from a GGUF file."""
    kind = gguf_type or "f16"
    source = source_gguf(workspace.settings, Path(str(workspace.lm.model.config.name_or_path)))
    if source is None:
        raise ServiceError(
            f"{workspace.lm.name} was not loaded from a GGUF file, whose tokenizer and settings the new one takes; "
            'use format="gguf_lora" beside a GGUF of the base, or export as merged and convert the folder with '
            "llama.cpp's convert_hf_to_gguf.py"
        )
    bytes_each = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}[kind]
    need_room(file.parent, int(workspace.lm.parameters * bytes_each))
    changed = sorted(join_deltas([active.patch for active in selection.stack]))

    def report(fraction: float) -> None:
        ctx.check()
        ctx.report(0.1 + 0.8 * fraction, 1.0, f"writing {file.name}")

    notes = about(workspace, selection.edits, weights_hash)
    write_model(workspace.lm, source, changed, kind, notes, file, report)


def refuse_quantised(workspace: Workspace, what: str) -> None:
    """Raise ServiceError where the weights are quantised: an edit stands beside them and never in them."""
    how = workspace.lm.quantisation
    if how is not None:
        raise ServiceError(
            f"edits of a quantised model ({how}) act beside its weights and cannot be {what}: written into them they "
            'would be rounded away. format="lora" or "gguf_lora" has them exactly, for this base; for a whole model '
            "start the server without --quantize on the unquantised one and teach the facts there (list_edits has them)"
        )


def loadable_base(workspace: Workspace) -> str:
    """What others load the base model by: its hub id, or the folder it was loaded from."""
    path = Path(str(workspace.lm.model.config.name_or_path))
    given = workspace.settings.model
    is_local = given == "default" or Path(given).expanduser().exists()
    return str(path.absolute()) if is_local and path.is_dir() and path.name else workspace.lm.name


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


def write_base(workspace: Workspace, target: Path, shard: str) -> None:
    """Write the unedited model as a folder that transformers and vLLM load."""
    with workspace.host.pristine():
        write_merged(workspace.lm, target, shard)


def write_merged(lm: LM, scratch: Path, shard: str) -> None:
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    need_room(scratch.parent, size)
    lm.model.save_pretrained(scratch, max_shard_size=shard)
    lm.tokenizer.save_pretrained(scratch)
