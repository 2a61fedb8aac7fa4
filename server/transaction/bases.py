"""Finds the loaded model on the ledger: the same weights, the same in another precision, or a new model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.model.lm import LM
from server.transaction.host import ModelHost, hash_of_weights
from store import Ledger, ModelRecord, StackEntry

PRECISION = "precision"
"""The event after which the live weights are those of the same base in another precision."""

REBASED = "rebased"
"""The event of a rebase to a model: which old edits became which, and why others did not."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WeightsIn = Callable[[torch.dtype], Mapping[str, Tensor]]
"""The weights of the loaded model's files in another precision, by name."""


@dataclass(frozen=True)
class Base:
    """The loaded model on the ledger."""

    model_id: int | None  # None: the ledger does not know it
    base_hash: str  # of its weights in the precision in which the ledger first saw them
    live_hash: str  # of its weights in the precision in which the last recorded state is


def find_base(ledger: Ledger, host: ModelHost, weights_in: WeightsIn | None) -> Base:
    """The loaded model on the ledger, whatever precision it is loaded in.

    It is the model with the hash of the loaded weights, if that has edits. Otherwise it may be a model that was
    edited in another precision: the loaded weights are read in that precision, and the hashes are compared.
    """
    models = ledger.models()
    here = next((m for m in models if m.base_hash == host.base_hash), None)
    if here is None or not here.edits:
        here = _same_in_another_precision(ledger, host, models, weights_in) or here
    if here is None:
        return Base(None, host.base_hash, host.base_hash)
    last = ledger.last_event(PRECISION, {}, model_id=here.id)
    return Base(here.id, here.base_hash, here.base_hash if last is None else last.payload["base_hash"])


def _same_in_another_precision(
    ledger: Ledger, host: ModelHost, models: Sequence[ModelRecord], weights_in: WeightsIn | None
) -> ModelRecord | None:
    seen = ledger.last_event(PRECISION, {"base_hash": host.base_hash})
    if seen is not None:  # it was loaded so before
        return next((m for m in models if m.id == seen.model_id), None)
    lm = host.lm
    if lm.quantisation is not None:  # its weights are not those of another precision
        return None
    hashes: dict[torch.dtype, str] = {}
    for model in models:
        dtype = DTYPES.get(model.dtype or "")
        if dtype is None or dtype == lm.dtype or not model.edits or model.architecture != lm.arch.family:
            continue
        if dtype not in hashes:
            hashes[dtype] = hash_of_weights(lm.named_by_edits(_in_precision(lm, dtype, weights_in)))
        if model.base_hash == hashes[dtype]:
            return model
    return None


def _in_precision(lm: LM, dtype: torch.dtype, weights_in: WeightsIn | None) -> Mapping[str, Tensor]:
    """The pristine weights in another precision: from their files, which may hold more bits than the model."""
    if weights_in is not None:
        return weights_in(dtype)
    return {name: p.data.to(dtype) for name, p in lm.model.named_parameters()}


def precision_note(here: str, entries: Sequence[StackEntry]) -> str:
    """A note on edits that now act in another precision."""
    count = sum(len(entry.rows) for entry in entries)
    made = sorted({str(entry.environment.get("dtype", "another precision")) for entry in entries})
    if made == [here]:
        return f"{count} active edits act in {here} again, as they were made"
    return (
        f"{count} active edits were made in {', '.join(made)} and are rebuilt here on the same weights in {here}; "
        "audit_edits shows how well they hold"
    )


def elsewhere_note(ledger: Ledger, lm: LM, model_id: int | None) -> str:
    """Names the active edits of other models, which do not act on the loaded one; empty when there are none.

    Those that rebase_edits has dealt with on this model are not named any more.
    """
    models = [m for m in ledger.models() if m.active and m.id != model_id]
    done = _dealt_with(ledger, model_id) if models else set()
    left = {m.id: sum(r.id not in done for r in ledger.active_edits(m.id)) for m in models}
    others = [m for m in models if left[m.id]]
    if not others:
        return ""
    listed = "; ".join(
        f"{left[m.id]} active edits are of {m.name!r} ({m.architecture}, {m.dtype}, base hash {m.base_hash[:12]})"
        for m in others
    )
    same_name = any(m.name == lm.name for m in others)
    changed = f" The weights of {lm.name!r} differ from those that they were made on." if same_name else ""
    return (
        f"{listed}: they do not act on the model that is loaded.{changed} Start the server with that model to have "
        'them, or carry them over to this one: rebase_edits(approve="ask") plans it (list_edits shows them).'
    )


def _dealt_with(ledger: Ledger, model_id: int | None) -> set[str]:
    """The ids of old edits that rebases to this model had an outcome for, steering doses of their base included."""
    found: set[str] = set()
    for event in ledger.events_of_kind([REBASED]):
        if event.model_id == model_id:
            found |= {*event.payload["edits"], *event.payload["not_carried"]}
    return found


def tokenizer_note(here: str, entries: Sequence[StackEntry]) -> str:
    """Names the active edits that were made with another tokenizer; empty when there are none."""
    ids = [
        entry.edit_ids[row]
        for entry in entries
        for row in entry.rows
        if entry.environment.get("tokenizer", here) != here
    ]
    if not ids:
        return ""
    shown = ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
    return (
        f"the tokenizer is not the one that {shown} were made with, so they may not hold: put the model's own "
        "tokenizer files back and start again, or audit_edits, then revert and apply anew what fails"
    )
