"""What is handed to an engine: the edits as an adapter or as weights, written in the form that it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from editors.errors import EditError
from editors.finetune.peft_format import CONFIG, WEIGHTS, as_adapter
from editors.finetune.peft_import import read_adapter
from editors.model.deltas import Delta, LowRank
from editors.model.lm import LM
from editors.patch import join_deltas
from server.errors import ServiceError
from server.exchange.files import need_room, sha256_of
from server.exchange.formats import loadable_base, refuse_quantised
from server.exchange.gguf_files import write_lora
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace

Form = Literal["lora", "gguf_lora", "tensors", "merged"]
CHANGED = "errata_changed.json"
"""In a folder of tensors: which of them differ from the pristine model's."""


@dataclass(frozen=True)
class Artefact:
    """A file or folder for an engine."""

    path: Path
    form: Form
    sha256: Mapping[str, str]  # of every file, by its name
    ranks: Mapping[str, int]
    changed: tuple[str, ...]  # weights that differ from the pristine model's

    def is_whole(self) -> bool:
        """Whether the files are still those that were written."""
        return all(
            (self.path / name).is_file() and sha256_of(self.path / name) == digest
            for name, digest in self.sha256.items()
        )


def write(
    workspace: Workspace,
    form: Form,
    stack: Sequence[ActivePatch],
    path: Path,
    max_rank: int | None,
    also: Iterable[str] = (),
    about: Mapping[str, Any] | None = None,
    base: str | None = None,
    card: Callable[[int], str] | None = None,
) -> Artefact:
    """Write the staged stack into the new folder `path`. Raises ServiceError for changes that the form cannot hold.

    Args:
        also: weights that the engine may have from earlier edits; they are written too, as they are now.
        base: name of the base model there; left out: the name that loads it here.
        card: of an adapter's rank the text of its README.md, for people who find the files.
    """
    deltas = join_deltas([active.patch for active in stack])
    _refuse_unfit(workspace, form, [*deltas, *also])
    scratch = path.with_name(f".writing-{path.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        ranks: Mapping[str, int] = {}
        if form in ("lora", "gguf_lora"):
            named = base or loadable_base(workspace)
            ranks = _write_adapter(workspace, form, deltas, scratch, max_rank, about or {}, named)
            if card is not None:
                (scratch / "README.md").write_text(card(max(ranks.values())), "utf-8")
        elif form == "tensors":
            _write_tensors(workspace.lm, sorted({*deltas, *also}), sorted(deltas), scratch)
        else:
            need_room(scratch, sum(p.numel() * p.element_size() for p in workspace.lm.model.parameters()))
            workspace.lm.model.save_pretrained(scratch)
            workspace.lm.tokenizer.save_pretrained(scratch)
        (scratch / "errata.json").write_text(json.dumps(about or {}, ensure_ascii=False, indent=1), "utf-8")
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)
    except OSError as error:
        raise ServiceError(f"{path.parent} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sums = {f.relative_to(path).as_posix(): sha256_of(f) for f in sorted(path.rglob("*")) if f.is_file()}
    return Artefact(path, form, sums, dict(ranks), tuple(sorted(deltas)))


def _refuse_unfit(workspace: Workspace, form: Form, names: Sequence[str]) -> None:
    """Raise ServiceError for changed weights that the form cannot hold."""
    if form in ("tensors", "merged"):
        refuse_quantised(
            workspace, "pushed as weights; name an engine that takes an adapter (vllm_lora, sglang_lora)"
        )
    experts = [name for name in names if name in workspace.lm.experts]
    if form == "tensors" and experts:
        raise ServiceError(
            f"{experts[0]} are the experts of a layer, which no engine takes as single weights; name an engine "
            "that takes the whole model (sglang_weights, folder), or export as merged"
        )


def _write_adapter(
    workspace: Workspace,
    form: Form,
    deltas: Mapping[str, list[Delta]],
    folder: Path,
    max_rank: int | None,
    about: Mapping[str, Any],
    base: str,
) -> Mapping[str, int]:
    adapter = as_adapter(workspace.lm, deltas or nothing(workspace.lm), base, None)
    if max_rank is not None and max(adapter.ranks.values()) > max_rank:
        adapter = as_adapter(workspace.lm, deltas, base, max_rank)
    if form == "gguf_lora":
        write_lora(workspace.lm, adapter.deltas, about, folder / "adapter.gguf")
    else:
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(adapter.tensors, metadata={"format": "pt"}))
        (folder / CONFIG).write_text(json.dumps(adapter.config, indent=1, sort_keys=True), "utf-8")
    return adapter.ranks


def nothing(lm: LM) -> dict[str, list[Delta]]:
    """A change of zero: the engine keeps an adapter of this name even if no edit is active."""
    name = lm.mlp_out(lm.n_layers // 2)
    d_out, d_in = lm.shape(name)
    return {name: [LowRank(torch.zeros(d_out, 1), torch.zeros(1, d_in))]}


def _write_tensors(lm: LM, names: Sequence[str], changed: Sequence[str], folder: Path) -> None:
    """The named weights as they are now, with the model's configuration."""
    if not names:
        names = [lm.mlp_out(lm.n_layers // 2)]  # engines refuse a folder without weights
    tensors = {name: lm.model.get_parameter(name).detach().cpu().contiguous() for name in names}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lm.model.config.save_pretrained(folder)
    (folder / CHANGED).write_text(json.dumps(list(changed)), "utf-8")


def load_adapter(lm: LM, folder: Path) -> dict[str, list[Delta]]:
    """The change that a written PEFT adapter makes, read back from its files by the pristine model.

    Raises ServiceError for files that are missing, damaged or do not fit the model.
    """
    try:
        deltas = join_deltas([read_adapter(lm, folder).patch])
    except (EditError, OSError) as error:
        raise ServiceError(f"the adapter in {folder} cannot be read back: {error}") from error
    if not deltas:
        raise ServiceError(f"the adapter in {folder} has no weights")
    return deltas
