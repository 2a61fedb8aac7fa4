"""A ledger with thousands of edits, recorded as a server records them, in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from store import Ledger, NewPatch, Who

WHO = Who("agent", "1.0", None, "alice")
METHODS = ("constrained", "rome", "memit", "in_context")


def fill(home: Path, edits: int = 10_000, batch: int = 200, seed: int = 0) -> Path:
    """Record `edits` edits in calls of `batch`; some are rejected, reverted, audited and found not to hold."""
    chance = random.Random(seed)
    with Ledger.open(home) as ledger:
        model = ledger.model("base" * 16, "default", "llama")
        for state, start in enumerate(range(0, edits, batch), 1):
            numbers = range(start, min(edits, start + batch))
            ids = _record(ledger, model, numbers, state - 1, chance)
            if ids and chance.random() < 0.2:
                ledger.record_reverted(
                    ids, f"w{state}", WHO, reason="a newer source says otherwise", drift=_drift(state)
                )
            elif ids and chance.random() < 0.3:
                values = {i: _measured("Rome", chance.random() < 0.9, chance) for i in ids}
                ledger.record_measurements(values, "audit", _drift(state), WHO)
    return home


def _record(ledger: Ledger, model: int, numbers: range, state: int, chance: random.Random) -> list[str]:
    rejected = chance.random() < 0.05
    patch = NewPatch(
        model_id=model,
        method=METHODS[state % len(METHODS)],
        params={"layers": [3]},
        kind="weight",
        blob=f"patch {state}".encode(),
        requests=[
            {
                "subject": f"Country {n}",
                "prompt": f"The capital of Country {n} is",
                "target": f"City {n}",
                "previous": f"Town {n}",
            }
            for n in numbers
        ],
        measurements=[_measured(f"City {n}", not rejected, chance) for n in numbers],
        drift=_drift(state),
        weights_hash_before=f"w{state}",
        weights_hash_after=f"w{state + 1}",
        environment={"torch": "2"},
        seconds=3.0,
        reason=f"the census of {2000 + state % 26}",
        source=f"https://example.org/{state}",
    )
    if rejected:
        ledger.record_rejected(patch, ["min_reliability 1: measured 0.000"], WHO)
        return []
    return ledger.record_applied(patch, WHO)


def _measured(target: str, holds: bool, chance: random.Random) -> dict[str, Any]:
    forms = {
        kind: float(chance.random() < 0.9) for kind in ("statement", "reworded", "chat", "chat_reworded")
    }
    return {
        "before": "Town, the old one",
        "after": target if holds else "Town, the old one",
        "reliability": float(holds),
        "generality": forms["reworded"],
        "locality": 1.0,
        "portability": None,
        "forms": forms,
        "subject_locality": chance.choice([0.25, 0.75, 1.0, 1.0]),
        "p_target_before": 0.001,
        "p_target_after": 0.93,
        "details": [
            _probe(kind, chance) for kind in ("form", "form", "neighbour", "neighbour", "sibling", "hold")
        ],
    }


def _probe(kind: str, chance: random.Random) -> dict[str, Any]:
    held = chance.random() < 0.9
    return {
        "kind": kind,
        "prompt": "The river that runs through it is called",
        "expected": "the Tiber",
        "before": "the Tiber",
        "after": "the Tiber" if held else "the Seine",
        "held": held,
        "form": "statement",
        "trained": False,
    }


def _drift(state: int) -> dict[str, float]:
    return {"kl": 0.0005 * state, "perplexity_before": 12.0, "perplexity_after": 12.0 * (1 + 0.0004 * state)}
