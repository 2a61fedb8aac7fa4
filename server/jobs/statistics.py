"""The job that computes second moments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editors.errors import EditError, InvalidEdit
from editors.metric import RIDGE
from editors.moments import Statistics, condition_of, sample_name
from editors.peak_memory import peak_memory_mb
from server.errors import ServiceError
from server.jobs.job import Job
from server.named_files import named_file
from server.transaction.model_lock import Turn
from server.transaction.workspace import Workspace

KIND = "compute_statistics"
MAX_CORPUS = 4 * 2**30  # bytes
DATASET = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # owner/name, with a configuration
FILES = (".txt", ".md", ".text", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zip")
"""Endings by which a name means a missing file, not a data set."""


def check(
    workspace: Workspace, layers: Sequence[int] | None, tokens: int | None, corpus: str | None
) -> dict[str, Any]:
    """The job's request. Raises InvalidEdit for a layer or a corpus that is not there."""
    lm = workspace.lm
    wanted = sorted(set(range(lm.n_layers) if layers is None else layers))
    if not wanted:
        raise InvalidEdit("layers is empty; name at least one, or leave it out for all")
    for layer in wanted:
        lm.mlp_out(layer)  # raises InvalidEdit for one that does not exist
    if lm.is_seq2seq:
        raise InvalidEdit(
            "second moments are for decoder-only models; this one needs none for mend, serac, ft or lora"
        )
    return {"layers": wanted, "tokens": tokens, "corpus": _checked_corpus(workspace, corpus)}


def _checked_corpus(workspace: Workspace, corpus: str | None) -> str | None:
    """The real path of a file that may be read, or the name of a data set. Raises ServiceError."""
    if corpus is None:
        return None
    try:
        return str(named_file(workspace.settings, "corpus", corpus, MAX_CORPUS))
    except ServiceError as error:
        if DATASET.fullmatch(corpus) and Path(corpus).suffix not in FILES:
            return corpus
        raise ServiceError(f"{error}. A data set is named as owner/name; left out, text is sampled") from None


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Compute what is missing, or has fewer tokens than requested, and report its condition."""
    layers, tokens = job.request["layers"], job.request["tokens"]
    corpus: Path | str | None = job.request["corpus"]
    if corpus is not None and Path(corpus).is_absolute():
        corpus = named_file(workspace.settings, "corpus", str(corpus), MAX_CORPUS)
    sample, shared = sample_name(corpus), workspace.statistics
    own = Statistics(shared.folder, workspace.base_hash, tokens or 0, workspace.lm.device, workspace.made)
    few = [layer for layer in layers if tokens and _has_fewer(own, layer, sample, tokens)]
    with workspace.turn(check=job.check, bounded=False):
        shared.forget(few, sample)
    own.forget(few, sample)
    turn = Turn(job.turn, workspace.host.borrowed)

    def report(fraction: float, message: str) -> None:
        job.report(
            0.9 * fraction, message
        )  # may raise: while we have the model, so that everything is given back
        turn.give_way()

    with turn.taken() as lm:
        own.ensure(lm, layers, report, corpus)
    reports = []
    for n, layer in enumerate(layers):
        job.report(0.9 + 0.1 * n / len(layers), f"condition of layer {layer}")
        reports.append(_report(own, layer, sample))
    return {"sample": sample, "layers": reports, "peak_memory_mb": peak_memory_mb()}


def _has_fewer(statistics: Statistics, layer: int, sample: str, tokens: int) -> bool:
    """True for a second moment that is there, of fewer tokens than these."""
    if layer in statistics.missing([layer], sample):
        return False
    try:
        return statistics.get(layer, sample).tokens < tokens
    except EditError:  # a damaged file: compute it again
        return True


def _report(statistics: Statistics, layer: int, sample: str) -> dict[str, Any]:
    """How well a layer's second moment can be inverted; `condition` is None where it is singular."""
    moment = statistics.get(layer, sample)
    condition = condition_of(moment, RIDGE, statistics.device)
    return {
        "layer": layer,
        "tokens": moment.tokens,
        "width": moment.matrix[..., 0].numel(),
        "tokens_per_width": round(condition.tokens_per_input, 2),
        "condition": condition.condition if math.isfinite(condition.condition) else None,
        "condition_with_ridge": condition.regularised,
        "effective_rank": round(condition.effective_rank, 1),
    }
