"""Read pairs from files, and export vectors to files."""

from __future__ import annotations

import safetensors.torch

from editors.steering.choices import FileFormat
from editors.steering.pairs import MAX_FILE, Pair, read_pairs
from editors.steering.vector import check_name, control_vectors, export_gguf
from server.errors import ServiceError
from server.exchange.files import folder, new_entry, publish_file, refuse_existing
from server.named_files import named_file
from server.settings import Settings
from server.steering.results import VectorExport
from server.steering.stored import vector_named
from server.transaction.workspace import Workspace


def pairs_of_file(settings: Settings, path: str) -> list[Pair]:
    """Read pairs from a .json or .jsonl file (see server/named_files.py). Raises ServiceError or InvalidEdit."""
    return read_pairs(named_file(settings, "path", path, MAX_FILE, suffixes=(".json", ".jsonl")))


def export_vector(
    workspace: Workspace, name: str, format: FileFormat, file_name: str | None, multiplier: float
) -> VectorExport:
    """Write a vector at a multiplier to a new file in HOME/exports. Raises ServiceError where it exists already."""
    vector = vector_named(workspace, check_name(name))
    if multiplier == 0 or abs(multiplier) > 100:
        raise ServiceError(
            f"multiplier {multiplier:g} cannot be exported; use 1 to set the dose where it is loaded"
        )
    stem = check_name(file_name or name)
    file = f"{stem}.{format}"
    target = folder(workspace.settings.home, "exports") / file
    refuse_existing(target)
    with new_entry(workspace.settings.home, file) as scratch:
        if format == "gguf":
            export_gguf(vector, multiplier, scratch / file, workspace.lm.arch.family)
        else:
            tensors = {f"layer.{k}": v.contiguous() for k, v in control_vectors(vector, multiplier).items()}
            header = {
                "format": "pt",
                "model": workspace.host.base_hash,
                "method": vector.method,
                "name": name,
            }
            safetensors.torch.save_file(tensors, scratch / file, metadata=header)
        written = publish_file(scratch / file, target, [file])
    return VectorExport(
        path=str(written.path),
        format=format,
        files=written.names,
        bytes=written.bytes,
        sha256=written.sha256,
        info={
            "layers": list(vector.layers),
            "multiplier": multiplier,
            "model_hint": workspace.lm.arch.family,
        },
    )
