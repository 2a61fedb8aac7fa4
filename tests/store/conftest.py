"""A fresh ledger, and a short way to fill it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store import Ledger, NewPatch, Who

WHO = Who("test-client", "1.2", "r-7")


class Book:
    """A ledger with one model and a running weights hash, so that a test says only what it is about."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.model = ledger.model("base" * 16, "default", "llama")
        self.state = 0

    def patch(self, *subjects: str, target: str = "Rome", **changes: Any) -> NewPatch:
        before, self.state = self.state, self.state + 1
        requests = [{"subject": s, "prompt": f"The capital of {s} is", "target": target} for s in subjects]
        values: dict[str, Any] = {
            "model_id": self.model,
            "method": "rome",
            "params": {"layers": [3], "simplified": True},
            "kind": "weight",
            "blob": f"{subjects}{target}{self.state}".encode(),
            "requests": requests,
            "measurements": [{"reliability": 1.0, "generality": None, "after": target}] * len(subjects),
            "drift": {"kl": 0.01, "perplexity_before": 9.0, "perplexity_after": 9.1},
            "weights_hash_before": f"w{before}",
            "weights_hash_after": f"w{self.state}",
            "environment": {"torch": "2"},
            "seconds": 1.5,
        }
        return NewPatch(**(values | changes))

    def apply(self, *subjects: str, **changes: Any) -> list[str]:
        return self.ledger.record_applied(self.patch(*subjects, **changes), WHO)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def ledger(home: Path) -> Iterator[Ledger]:
    with Ledger.open(home) as opened:
        yield opened


@pytest.fixture
def book(ledger: Ledger) -> Book:
    return Book(ledger)
