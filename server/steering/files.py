"""Files of steering: pairs that are read, vectors that are written."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from editors.errors import InvalidEdit
from editors.steering.choices import FileFormat
from editors.steering.pairs import Pair, read_pairs
from editors.steering.vector import check_name, control_vectors, export_gguf
from server.errors import ServiceError
from server.exchange.files import folder, new_entry, publish_file, refuse_existing
from server.settings import Settings
from server.steering.results import VectorExport
from server.steering.stored import vector_named
from server.transaction.workspace import Workspace


def pairs_of_file(settings: Settings, path: str) -> list[Pair]:
    """Pairs of a .json or .jsonl file.

    A relative path is one under HOME/data. Over stdio, where the client is on this machine already, an
    absolute path is read as it is; over http only what lies in HOME/data is, links followed to where they
    lead. Raises InvalidEdit.
    """
    data = (settings.home / "data").resolve()
    asked = Path(path)
    if "\x00" in path or asked.suffix not in (".json", ".jsonl"):
        raise InvalidEdit(f"path {path[:200]!r} must name a .json or .jsonl file")
    try:
        found = (asked if asked.is_absolute() else data / asked).resolve()
    except (OSError, RuntimeError) as error:
        raise InvalidEdit(f"path {path[:200]!r} cannot be followed: {error}") from None
    free = asked.is_absolute() and settings.transport == "stdio"
    if not free and not found.is_relative_to(data):
        raise InvalidEdit(
            f"path {path[:200]!r} leads out of {data}; put the file there, or send the pairs in the call"
        )
    if not found.is_file():
        raise InvalidEdit(f"path {path[:200]!r}: there is no file {found}; relative paths start at {data}")
    return read_pairs(found)


def export_vector(
    workspace: Workspace, name: str, format: FileFormat, file_name: str | None, multiplier: float
) -> VectorExport:
    """Write a vector at a multiplier under HOME/exports; nothing there is overwritten."""
    vector = vector_named(workspace, check_name(name))
    if multiplier == 0 or abs(multiplier) > 100:
        raise ServiceError(f"multiplier {multiplier:g} cannot be exported; 1 leaves the dose to the reader")
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
