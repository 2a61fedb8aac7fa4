"""What the ledger alone says the model is: read with plain SQL, put on a fresh model, without the server's code."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

from editors.model.deltas import rebuilt
from editors.patch import join_deltas
from editors.patch_kinds import load
from server.transaction.host import hash_of_weights
from store import Ledger
from tests.families import fresh

ACTIVE = """SELECT p.kind, p.blob FROM patches p WHERE p.blob IS NOT NULL
  AND EXISTS (SELECT 1 FROM edits e WHERE e.patch_id = p.id AND e.status = 'active') ORDER BY p.position"""


def rows_of(home: Path, sql: str) -> list[tuple[str, ...]]:
    """What a SELECT answers, by a connection of its own."""
    with closing(sqlite3.connect(f"file:{home / 'ledger.db'}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


def statuses_of(home: Path) -> dict[str, str]:
    """Edit id -> status."""
    return {str(name): str(status) for name, status in rows_of(home, "SELECT id, status FROM edits")}


def problems_of(home: Path) -> list[str]:
    """What `verify` finds in a ledger that a server may be writing."""
    with Ledger.open(home, read_only=True) as ledger:
        return [str(problem) for problem in ledger.verify()]


def hashes_of(home: Path, family: str) -> tuple[str, str]:
    """(weights hash, state hash) of pristine weights plus the active patches in ledger order."""
    lm = fresh(family)
    active = rows_of(home, ACTIVE)
    data = {blob: (home / "blobs" / f"{blob}.safetensors").read_bytes() for _, blob in active}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in data.items())
    patches = [load(data[blob]) for _, blob in active]
    for name, deltas in join_deltas(patches).items():
        lm.put(name, rebuilt(lm.weight(name), deltas))
    weights = hash_of_weights({name: p.data for name, p in lm.model.named_parameters()})
    live = [blob for kind, blob in active if kind != "weight"]
    return weights, hashlib.sha256("\n".join([weights, *live]).encode()).hexdigest()
