"""Services on tiny models, opened the way the server opens them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from editors.edit import Edit
from editors.steering.pairs import Pair
from server.services import Services
from server.settings import Settings
from server.steering.requests import VectorRequest
from store import Ledger
from tests.families import fresh

QUICK = {"mode": "simplified", "max_steps": 3, "stop_probability": 0.9}
"""Parameters with which an edit of a tiny model takes milliseconds, whatever comes of it."""

STRONG = {
    "mode": "simplified",
    "contexts": 1,
    "lr": 2.0,
    "clamp": 100.0,
    "max_steps": 60,
    "kl_weight": 0.0,
    "decay": 0.0,
}
"""Parameters with which even a random model learns a fact."""

FACTS = (
    Edit(
        subject="France",
        prompt="The capital of {} is",
        target="Rome",
        paraphrases=("France has the capital",),
        neighbours=({"prompt": "The capital of Japan is"},),  # type: ignore[arg-type]
    ),
    Edit(subject="Japan", prompt="The capital of {} is", target="Paris"),
    Edit(subject="Spain", prompt="The language of {} is", target="French"),
)

PAIRS = [
    Pair(prompt="Rome", positive="good", negative="bad"),
    Pair(prompt="Oslo", positive="yes", negative="no"),
]


def open_services(
    home: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> Services:
    """Services on a fresh model, which replay what HOME's ledger says."""
    chosen = Settings(home=home, **settings)
    ledger = Ledger.open(home, read_only=chosen.read_only)
    try:
        return Services.open(chosen, fresh(family, dtype), ledger, lambda done, total, message: None)
    except BaseException:
        ledger.close()
        raise


def apply(services: Services, *edits: Edit, **more: Any) -> list[str]:
    """Apply quickly, whatever comes of it; the ids."""
    return services.edits.apply(list(edits), method="rome", params=dict(QUICK), **more).edit_ids


def weights(services: Services, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Copies of the live parameters."""
    live = dict(services.workspace.host.lm.model.named_parameters())
    return {name: live[name].detach().clone() for name in names or live}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """True when two sets of weights agree in every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def with_two_vectors(home: Path, family: str) -> Services:
    """Services with the vectors "mood" (layer 1) and "tone" (layer 2)."""
    services = open_services(home, family)
    for name, layer in (("mood", 1), ("tone", 2)):
        pairs = PAIRS if name == "mood" else [Pair(prompt="Japan", positive="old", negative="young")]
        services.steering.create(VectorRequest(name=name, pairs=pairs, layers=[layer]))
    return services
