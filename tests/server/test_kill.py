"""kill -9 at random moments while edits run: nothing acknowledged is lost, nothing is half done.

`KILL_ROUNDS=50 pytest tests/server/test_kill.py` kills more often than the suite does.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.server.processes import Gone, Wire

pytestmark = [pytest.mark.model, pytest.mark.slow]

ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
LATEST = 4.0
"""Seconds after the first operation at which the process is killed at the latest; each takes about one."""
START = 3.0
"""Seconds in which a server is about ready."""

QUICK = {"mode": "simplified", "max_steps": 3, "contexts": 1}
PLACES = (
    "France",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "Italy",
    "Cuba",
    "Chad",
    "Iran",
    "Laos",
    "Mali",
    "Oman",
)


@dataclass
class Known:
    """What the client may rely on: the state after the last answer, and what it asked for then."""

    statuses: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    asked: dict[str, str] | None = None  # the state if the unanswered operation did happen

    def settle(self, statuses: dict[str, str], weights: str) -> None:
        """The server came back with this state. It must be the one before or after the operation."""
        if statuses == self.statuses:
            assert weights == self.weights or not self.weights
        else:
            assert statuses == self.asked, "an operation was lost or half done"
        self.statuses, self.weights, self.asked = statuses, weights, None


def operations(known: Known, chance: random.Random) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Endless work: a tool, its arguments, and the state it leads to."""
    while True:
        active = [i for i, s in known.statuses.items() if s == "active"]
        reverted = [i for i, s in known.statuses.items() if s == "reverted"]
        kind = chance.choice(
            ["apply", "apply", "revert" if active else "apply", "reapply" if reverted else "apply"]
        )
        if kind == "apply":
            n = len(known.statuses)
            new = {f"e{n + 1}": "active", f"e{n + 2}": "active"}
            yield (
                "apply_edits",
                {"edits": [fact(n), fact(n + 1)], "method": "rome", "params": QUICK},
                known.statuses | new,
            )
        elif kind == "revert":
            some = chance.sample(active, chance.randint(1, min(3, len(active))))
            yield "revert_edits", {"edit_ids": some}, known.statuses | dict.fromkeys(some, "reverted")
        else:
            some = chance.sample(reverted, chance.randint(1, min(3, len(reverted))))
            yield "reapply_edits", {"edit_ids": some}, known.statuses | dict.fromkeys(some, "active")


def fact(number: int) -> dict[str, str]:
    """The n-th fact; no two are about the same prompt."""
    place, sign = PLACES[number % len(PLACES)], number // len(PLACES)
    return {"subject": place, "prompt": f"In atlas number {sign}, the capital of {{}} is", "target": "Rome"}


def work_until_killed(server: Wire, known: Known, chance: random.Random) -> None:
    killer = threading.Timer(chance.uniform(0.0, LATEST), server.process.kill)
    killer.start()
    try:
        for tool, arguments, after in operations(known, chance):
            known.asked = after
            answer = server.told(tool, **arguments)
            known.statuses, known.weights, known.asked = after, answer["weights_hash"], None
    except Gone:
        return
    finally:
        killer.cancel()


def look(server: Wire, known: Known) -> None:
    """A server that was started after a kill stands as if nothing had happened.

    Its start has verified chain and patch files, and the replayed weights against the ledger's hash.
    """
    server.greet()
    rows = server.told("query_ledger", sql="SELECT id, status FROM edits", limit=1000)["rows"]
    status = server.told("model_status")
    assert (status["state"], status["damage"], status["read_only"]) == ("ready", [], False)
    known.settle(dict(rows), status["weights_hash"])


def kill_while_it_starts(home: Path, chance: random.Random) -> None:
    with Wire(home) as server:
        killer = threading.Timer(chance.uniform(0.0, START), server.process.kill)
        killer.start()
        server.process.wait()


def test_a_killed_server_loses_nothing_it_acknowledged(default_model_home: Path) -> None:
    known = Known()
    for number in range(ROUNDS):
        chance = random.Random(number)
        if number % 3 == 1:
            kill_while_it_starts(default_model_home, chance)
        with Wire(default_model_home) as server:
            look(server, known)
            work_until_killed(server, known, chance)
    with Wire(default_model_home) as server:
        look(server, known)
        active = [i for i, s in known.statuses.items() if s == "active"]
        audit = server.told("audit_edits", edit_ids=active[-1:] or None)
        assert audit["integrity"] == {"chain": True, "blobs": True, "weights": True, "problems": []}
        if active:
            reverted = server.told("revert_edits", edit_ids=active)
            assert reverted["weights_hash"] == server.told("model_status")["base_hash"]
