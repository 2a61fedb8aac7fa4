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

WRITER_OF_SEVERAL = """
import json, sys
from itertools import count
from pathlib import Path
from store import Ledger
from tests.store.conftest import WHO, Book

book = Book(Ledger.open(Path(sys.argv[1])))
print(json.dumps({"opened": True}), flush=True)
for n in count():
    patches = [book.patch(f"land {i}", target="Rome" * 2000) for i in range(5)]
    recorded = book.ledger.record_patches(patches, WHO)
    print(json.dumps({"applied": [patch.edit_ids[0] for patch in recorded]}), flush=True)
    data = f"{n} ".encode() * 5000
    book.ledger.record_vector(book.model, "mood", data, {"method": "caa", "n": n}, WHO, replace=True)
    print(json.dumps({"vector": n}), flush=True)
"""


def write_until_killed(home: Path, lines: int, writer: str = WRITER) -> list[dict[str, object]]:
    """Start a writer, read that many acknowledgements, kill it at once, return all it acknowledged."""
    process = subprocess.Popen([sys.executable, "-c", writer, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(lines)]
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
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


def test_kill_minus_nine_never_leaves_part_of_several_patches_nor_a_model_without_its_vector(
    home: Path,
) -> None:
    chance = random.Random(8)
    applied: list[str] = []
    for _ in range(ROUNDS):
        vector: int | None = None
        for line in write_until_killed(home, chance.randint(2, 20), WRITER_OF_SEVERAL):
            applied += line.get("applied", [])  # type: ignore[arg-type]
            vector = int(str(line.get("vector", vector))) if line.get("vector", vector) is not None else None
        with Ledger.open(home) as ledger:
            assert ledger.verify() == []
            ledger.edits(applied)
            assert len(ledger.stack(1)) % 5 == 0, "only some patches of one call"
            seen = ledger.find_vector(1, "mood")
            if vector is not None:
                assert seen is not None
                assert seen.about["n"] in (vector, vector + 1)
            for record in ledger.vectors(1):
                ledger.blobs.get(record.blob)
    assert len(applied) >= 5
