"""The texts of an export: what it is, how to load it, which edits are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.settings import errata_version
from server.transaction.workspace import Workspace
from store import EditRecord

_HEAD = """\
---
base_model: {base}
library_name: {library}
tags:
- knowledge-editing
- errata
---

# {name}

{what} Made by Errata {version} from `{base}`.

{how}

| | |
| --- | --- |
| base weights | `{base_hash}` |
| weights with these edits | `{weights_hash}` |

The hashes are SHA-256 over all weights, as Errata computes them. `errata.json` has everything that was measured.

## Edits

| id | prompt | answer | before | after | p(answer) before, after | method | why | source |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
_ADAPTER = """\
```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/{name}")
```

With vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=path/to/{name}`"""
BASE = "base"
"""Folder of the base model inside an adapter's, where it is there."""
_BESIDE = """\
Load the adapter with the folder `base` beside it: `base` below, and in `adapter_config.json`, is relative to where the
program runs, so run it in this folder or write the whole path of `base`.

"""
_MERGED = """\
```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/{name}")
tokenizer = AutoTokenizer.from_pretrained("path/to/{name}")
```"""
_FACTS = """\
`system_prompt.txt` goes in front of each conversation; `facts.jsonl` has a record for each fact, for a retriever."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank


def card(
    workspace: Workspace,
    name: str,
    base: str,
    edits: Sequence[EditRecord],
    weights_hash: str,
    rank: int | None,
) -> str:
    """README.md of an export. `base`: what loads the base model.

    `rank`: the adapter's; None for a merged model, 0 for facts as text.
    """
    auto = workspace.lm.arch.auto_class
    count = f"{len(edits)} corrected fact{'' if len(edits) == 1 else 's'}"
    if rank == 0:
        library, what, how = "generic", f"{count[:1].upper()}{count[1:]} as text.", _FACTS
    elif rank is None:
        library, what, how = "transformers", f"A language model with {count} in its weights.", _MERGED
    else:
        library, what, how = "peft", f"A LoRA adapter with {count}.", _ADAPTER
        how = _BESIDE + how if base == BASE else how
    fitting = next((r for r in RANKS if r >= (rank or 0)), rank)
    head = _HEAD.format(
        base=base,
        library=library,
        name=name,
        what=what,
        version=errata_version(),
        how=how.format(auto=auto, base=base, name=name, rank=fitting),
        base_hash=workspace.host.base_hash,
        weights_hash=weights_hash,
    )
    return head + "".join(_row(e, _measured(workspace, e)) for e in edits)


def _measured(workspace: Workspace, edit: EditRecord) -> Mapping[str, Any]:
    """The newest measurement of an edit that has its answers; empty where it was never measured."""
    known = workspace.ledger.measurements_of(edit.id)
    return next((m.values for m in reversed(known) if "after" in m.values), {})


def _row(e: EditRecord, measured: Mapping[str, Any]) -> str:
    before, after = measured.get("before") or e.previous, measured.get("after")
    shares = [measured.get(f"p_target_{when}") for when in ("before", "after")]
    probable = ", ".join(f"{share:.3g}" for share in shares if share is not None)
    cells = (e.id, e.prompt, e.target, before, after, probable, e.method, e.reason, e.source)
    return "| " + " | ".join(_cell(c) for c in cells) + " |\n"


def _cell(text: str | None) -> str:
    """Text that cannot break the table or the page."""
    flat = " ".join((text or "").split())[:300]
    for sign in "\\`|<>[]":
        flat = flat.replace(sign, f"&#{ord(sign)};")
    return flat


def about(workspace: Workspace, edits: Sequence[EditRecord], weights_hash: str) -> dict[str, Any]:
    """errata.json of an export: the same for programs."""
    return {
        "format": "errata-export-1",
        "version": errata_version(),
        "model": workspace.lm.name,
        "architecture": workspace.lm.arch.family,
        "base_hash": workspace.host.base_hash,
        "weights_hash": weights_hash,
        "environment": workspace.environment(),
        "edits": [edit_facts(e) for e in edits],
    }


def edit_facts(e: EditRecord) -> dict[str, Any]:
    """What an export says of one edit: nothing about who asked for it."""
    names = ("id", "method", "created", "reason", "source", "reliability", "generality", "locality")
    return {"request": e.request} | {name: getattr(e, name) for name in names}
