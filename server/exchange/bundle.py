"""A bundle: active edits with their patches and requests in one zip file, for another Errata.

`manifest.json` names the base model by the hash of its weights, and every patch file by its hash and size. A
bundle may come from anywhere, so archive, manifest and patches are all checked before any of it is used.
"""

from __future__ import annotations

import json
import re
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from editors.edit import Edit
from editors.errors import EditError
from editors.patch import Patch, save
from editors.patch_kinds import load
from server.errors import ServiceError
from server.exchange.model_card import edit_facts
from server.settings import errata_version
from server.transaction.host import ActivePatch
from server.transaction.stack import digest
from server.transaction.workspace import Workspace
from store import EditRecord

MANIFEST = "manifest.json"
FORMAT = "errata-bundle-1"
MAX_MANIFEST = 64 * 2**20
MAX_PATCH = 16 * 2**30
_PATCH_NAME = re.compile(r"patches/\d{4,6}\.safetensors")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
_EPOCH = (1980, 1, 1, 0, 0, 0)
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Short = Annotated[str, Field(max_length=500)]


class BundledEdit(BaseModel):
    """One edit of a patch, in the order of its rows."""

    model_config = ConfigDict(frozen=True)

    id: Short
    request: dict[str, Any]
    reason: str | None = None
    source: str | None = None

    @property
    def edit(self) -> Edit:
        """The request. Raises ValidationError when it is not one."""
        return Edit.model_validate({k: v for k, v in self.request.items() if k in Edit.model_fields})


class BundledPatch(BaseModel):
    """One patch and the edits of its rows."""

    model_config = ConfigDict(frozen=True)

    file: Annotated[str, Field(pattern=f"^{_PATCH_NAME.pattern}$")]
    sha256: Sha
    bytes: int = Field(ge=0, le=MAX_PATCH)
    method: Short
    kind: Short
    params: dict[str, Any]
    edits: list[BundledEdit] = Field(min_length=1)


class Manifest(BaseModel):
    """The contents of manifest.json."""

    model_config = ConfigDict(frozen=True)

    format: Literal["errata-bundle-1"]
    version: Short
    model: Short
    architecture: Short
    base_hash: Sha
    weights_hash: Sha
    environment: dict[str, Any]
    patches: list[BundledPatch] = Field(min_length=1)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked: every patch file is there with its hash."""

    manifest: Manifest
    patches: list[tuple[BundledPatch, Patch, bytes]]


# --- writing -------------------------------------------------------------------------------------


def write_bundle(
    path: Path, workspace: Workspace, edits: Sequence[EditRecord], stack: Sequence[ActivePatch]
) -> list[str]:
    """Write the patches of a stack as they are live. Returns the names of the files inside.

    The same edits give the same bytes.
    """
    entries: list[dict[str, Any]] = []
    names = [MANIFEST]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for number, active in enumerate(stack, 1):
            data = save(active.patch)
            name = f"patches/{number:04d}.safetensors"
            rows = [e for e in edits if e.patch_id == active.patch_id]
            entries.append(
                {
                    "file": name,
                    "sha256": digest(data),
                    "bytes": len(data),
                    "method": active.method,
                    "kind": active.patch.kind,
                    "params": workspace.ledger.get_patch(active.patch_id).params,
                    "edits": [edit_facts(e) for e in sorted(rows, key=lambda e: e.row)],
                }
            )
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
            names.append(name)
        manifest = {
            "format": FORMAT,
            "version": errata_version(),
            "model": workspace.lm.name,
            "architecture": workspace.lm.arch.family,
            "base_hash": workspace.host.base_hash,
            "weights_hash": workspace.host.weights_hash,
            "environment": workspace.environment(),
            "patches": entries,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
        archive.writestr(zipfile.ZipInfo(MANIFEST, _EPOCH), text)
    return names


# --- reading -------------------------------------------------------------------------------------


def read_bundle(path: Path) -> Bundle:
    """Read and check a whole bundle. Raises ServiceError that says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            manifest = _manifest(path, archive, members)
            return Bundle(manifest, list(_patches(path, archive, members, manifest)))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise ServiceError(
            f"{path.name} is not a whole bundle: {error}; it may have been cut off on the way, so copy it anew"
        ) from error


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files by name. Raises ServiceError for files that do not belong in a bundle."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.orig_filename
        why = _wrong(name, info) or ("is there twice" if name in members else "")
        if why:
            raise ServiceError(f"{path.name} holds {name[:120]!r}, which {why}; nothing was imported")
        members[name] = info
    if MANIFEST not in members:
        raise ServiceError(f"{path.name} has no {MANIFEST}; make bundles with export_edits(format='patches')")
    return members


def _wrong(name: str, info: zipfile.ZipInfo) -> str:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name or "\\" in name:
        return "leads outside the bundle"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    if name.lower().endswith(_PICKLES):
        return "can hold pickled code, which is never read"
    if name != MANIFEST and not _PATCH_NAME.fullmatch(name):
        return "does not belong in a bundle"
    if info.flag_bits & 1:
        return "is encrypted"
    return ""


def _manifest(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> Manifest:
    raw = _read(path, archive, members[MANIFEST], MAX_MANIFEST)
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"{path.name}: {MANIFEST} is not JSON ({error}); export it anew") from error
    try:
        manifest = Manifest.model_validate(parsed)
        for patch in manifest.patches:
            for edit in patch.edits:
                _ = edit.edit
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "request"
        raise ServiceError(
            f"{path.name}: {MANIFEST} is not that of a bundle of format {FORMAT}: {where}: {first['msg']}"
        ) from error
    listed = [p.file for p in manifest.patches]
    if sorted(listed) != sorted(n for n in members if n != MANIFEST):
        odd = sorted(set(listed) ^ {n for n in members if n != MANIFEST}) or listed
        raise ServiceError(f"{path.name}: {odd[0]} is in the manifest or in the archive, but not in both")
    return manifest


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    if info.file_size > most:
        raise ServiceError(f"{path.name}: {info.filename} has {info.file_size:,} bytes; the most is {most:,}")
    with archive.open(info) as file:
        data = file.read(most + 1)  # the declared size may lie
    if len(data) > most:
        raise ServiceError(f"{path.name}: {info.filename} is larger than the archive says")
    return data


def _patches(
    path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], manifest: Manifest
) -> Iterator[tuple[BundledPatch, Patch, bytes]]:
    for entry in manifest.patches:
        data = _read(path, archive, members[entry.file], entry.bytes)
        if digest(data) != entry.sha256:
            raise ServiceError(
                f"{path.name}: {entry.file} does not have the hash in the manifest; it was changed or damaged"
            )
        try:
            patch = load(data)
        except EditError as error:
            raise ServiceError(f"{path.name}: {entry.file}: {error}") from error
        if patch.kind != entry.kind:
            raise ServiceError(f"{path.name}: {entry.file} is a {patch.kind} patch, not {entry.kind}")
        yield entry, patch, data
