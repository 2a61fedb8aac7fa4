"""A writer is killed at any moment; whoever opens the ledger next finds every acknowledged edit, whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from store import Ledger

ROUNDS = 6

WRITER = """
import json, sys
from pathlib import Path
from store import Ledger
from tests.store.conftest import Book

book = Book(Ledger.open(Path(sys.argv[1])))
print(json.dumps({"opened": True}), flush=True)
while True:
    ids = book.apply("France", "Italy", target="Rome" * 2000)
    print(json.dumps({"applied": ids}), flush=True)
    patch_id = book.ledger.get_edit(ids[0]).patch_id
    book.ledger.record_reverted(ids[:1], "w", restack={patch_id: ids[1].encode() * 5000})
    print(json.dumps({"reverted": ids[0]}), flush=True)
"""


def write_until_killed(home: Path, lines: int) -> list[dict[str, object]]:
    """Start a writer, read that many acknowledgements, kill it at once, return all it acknowledged."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(home)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(lines)]
    writer.kill()
    said += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    return [json.loads(line) for line in said if line.endswith("\n")]


def test_kill_minus_nine_loses_nothing_that_was_acknowledged(home: Path) -> None:
    chance = random.Random(7)
    applied: list[str] = []
    reverted: set[str] = set()
    for _ in range(ROUNDS):
        for line in write_until_killed(home, chance.randint(1, 30)):
            applied += line.get("applied", [])  # type: ignore[arg-type]
            reverted |= {str(line["reverted"])} if "reverted" in line else set()
        with Ledger.open(home) as ledger:
            assert ledger.verify() == []
            edits = {edit.id: edit for edit in ledger.edits(applied)}
            assert all(edits[edit_id].status == "reverted" for edit_id in reverted)
            for entry in ledger.stack(1):
                assert len(entry.edit_ids) == 2, "half a batch"
                ledger.blobs.get(entry.blob)
            assert not list((home / "blobs").glob(".writing-*"))
    assert len(applied) >= 2 * ROUNDS
