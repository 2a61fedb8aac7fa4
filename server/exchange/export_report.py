"""The report of an export: its files, warnings, and how it is loaded."""

from __future__ import annotations

import time

from server.exchange.distillation import Distillation
from server.exchange.distilling import losses_in_words
from server.exchange.facts_file import FACTS, SYSTEM
from server.exchange.files import (
    ExportedFiles,
)
from server.exchange.formats import (
    AdapterFacts,
    Selection,
)
from server.exchange.model_card import RANKS
from server.exchange.results import ExportReport, Format
from server.transaction.workspace import Workspace


def export_report(
    workspace: Workspace,
    format: Format,
    selection: Selection,
    files: ExportedFiles,
    weights_hash: str,
    adapter: AdapterFacts,
    started: float,
    taught: Distillation | None,
) -> ExportReport:
    return ExportReport(
        path=str(files.path),
        format=format,
        base=selection.base,
        files=files.names,
        bytes=files.bytes,
        sha256=files.sha256,
        edit_ids=[edit.id for edit in selection.edits],
        base_hash=workspace.host.base_hash,
        weights_hash=weights_hash,
        ranks=dict(adapter.ranks),
        recompression_error=adapter.recompression_error,
        max_logit_difference=adapter.max_logit_difference,
        said=adapter.said,
        distilled=taught,
        seconds=time.monotonic() - started,
        warnings=[*_warnings(workspace, format, adapter), *losses_in_words(taught)],
        next=_next(format, selection.base, files, adapter),
    )


def _warnings(workspace: Workspace, format: Format, adapter: AdapterFacts) -> list[str]:
    if format == "facts":
        found = "was not measured" if adapter.said is None else f"says {adapter.said:.0%} of them"
        return [f"a system prompt is less than a memory: with it the unedited model {found}"]
    if adapter.rank is None:
        return []
    warnings = []
    if format == "lora" and adapter.rank > RANKS[-1]:
        warnings.append(
            f"the rank is {adapter.rank}, and vLLM takes at most {RANKS[-1]}; export with max_rank={RANKS[-1]}, "
            "or as merged"
        )
    if adapter.recompression_error:
        warnings.append(
            f"max_rank left out up to {adapter.recompression_error:.1%} of a weight's change; check the facts with "
            "the adapter on"
        )
    if workspace.lm.quantisation is not None:
        warnings.append(
            f"the edits were computed on the base as {workspace.lm.quantisation} weights; load it so, or check "
            "the facts with the adapter on"
        )
    elif workspace.lm.dtype.itemsize < 4:
        warnings.append(
            f"the live weights are rounded to {str(workspace.lm.dtype).removeprefix('torch.')} and an adapter is not, "
            "so logits differ a little; merged is exact"
        )
    return warnings


def _next(format: Format, base: str, files: ExportedFiles, adapter: AdapterFacts) -> str:
    path = files.path
    if format == "patches":
        return f"Put {path.name} into HOME/imports of an Errata with the same model and call import_patches."
    if format == "gguf":
        return f"llama-server -m {path}, or `FROM {path}` in a Modelfile for Ollama."
    if format == "gguf_lora":
        return (
            f"llama-server -m BASE.gguf --lora {path}, or `ADAPTER {path}` below `FROM BASE.gguf` in a Modelfile for "
            "Ollama; BASE.gguf is a GGUF file of the same base model, quantised or not."
        )
    if format == "facts":
        return f"Put {path / SYSTEM} in front of each conversation, or {path / FACTS} into a retriever."
    if adapter.rank is None:
        return f"AutoModel...from_pretrained({str(path)!r}), or vllm serve {path}."
    fitting = next((rank for rank in RANKS if rank >= adapter.rank), adapter.rank)
    return (
        f"peft.PeftModel.from_pretrained(base, {str(path)!r}), or vllm serve {base} --enable-lora "
        f"--max-lora-rank {fitting} --lora-modules {path.name}={path}"
    )
