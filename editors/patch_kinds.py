"""Every kind of patch, by the name it is saved under. A new kind is one line here.

The classes stand in modules of their own, so that reading a patch needs no editing method.
"""

from __future__ import annotations

import json

import safetensors
import safetensors.torch

from editors.errors import EditError
from editors.finetune.adapter import AdapterPatch
from editors.learned.serac_memory import RoutePatch
from editors.memory.code_book import CodeBookPatch
from editors.memory.fact_memory import InContextPatch
from editors.memory.side_memory import SideMemoryPatch
from editors.patch import FORMAT, Patch, WeightPatch
from editors.steering.stack import Dose
from editors.steering.vector import SteeringVector

KINDS: dict[str, type[Patch]] = {
    patch_class.kind: patch_class
    for patch_class in (
        WeightPatch,
        AdapterPatch,
        CodeBookPatch,
        InContextPatch,
        SideMemoryPatch,
        RoutePatch,
        Dose,
        SteeringVector,
    )
}


def load(data: bytes) -> Patch:
    """Read what `save` wrote. Raises EditError for anything else; never unpickles."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["errata"])
        parts = safetensors.torch.load(data)
        kind = KINDS[header["kind"]] if header["format"] == FORMAT else None
        info = dict(header["info"])
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise EditError(f"this is not a patch file of format {FORMAT}: {error}") from error
    if kind is None:
        raise EditError(f"patch format {header['format']!r} is not {FORMAT}; it was made by another version")
    tensors = {k[2:]: v for k, v in parts.items() if k.startswith("t/")}
    extra = {k[2:]: v for k, v in parts.items() if k.startswith("x/")}
    try:
        return kind.from_parts(tensors, extra, info)
    except (KeyError, ValueError) as error:
        raise EditError(f"this {kind.kind} patch lacks or garbles a part: {error}") from error
