"""Ablation: a direction is taken out of every state, survives a restart, and leaves no trace when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.model.activations import record
from server.services import Services
from server.steering.requests import DoseRequest
from server.steering.stored import vector_named
from tests.server.opened import open_services, with_two_vectors


@pytest.fixture(params=["llama", "gpt2"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    services = with_two_vectors(tmp_path / "home", request.param)
    yield services
    services.close()


def states(services: Services) -> tuple[dict[str, Tensor], Tensor]:
    """The states after every layer, and the logits."""
    lm = services.workspace.lm
    ids = torch.tensor([lm.encode(lm.prompt("The capital of France is"))[0]])
    with torch.no_grad(), record({str(i): layer for i, layer in enumerate(lm.layers)}) as seen:
        logits: Tensor = lm.model(input_ids=ids).logits
    return dict(seen), logits


def direction(services: Services, name: str, layer: int) -> Tensor:
    found = vector_named(services.workspace, name).directions[layer]
    return found / found.norm()


def test_an_ablated_direction_is_in_no_layers_states_and_off_is_exact(services: Services) -> None:
    _, plain = states(services)
    mood, tone = direction(services, "mood", 1), direction(services, "tone", 2)
    before = services.workspace.state_hash
    services.steering.set_dose(DoseRequest("mood", 1, mode="ablate"))
    services.steering.set_dose(DoseRequest("tone", 1, mode="ablate"))
    seen, logits = states(services)
    for state in seen.values():
        assert float((state @ mood).abs().max()) < 1e-4
        assert float((state @ tone).abs().max()) < 1e-4
    assert not torch.equal(plain, logits)
    assert [dose.mode for dose in services.steering.list().active] == ["ablate", "ablate"]
    services.steering.set_dose(DoseRequest("mood", 0))
    services.steering.set_dose(DoseRequest("tone", 0))
    assert torch.equal(plain, states(services)[1])
    assert services.workspace.state_hash == before


def test_an_ablation_is_there_after_a_restart_and_beside_a_dose(services: Services, tmp_path: Path) -> None:
    family = services.workspace.lm.arch.family
    services.steering.set_dose(DoseRequest("tone", 0.3))
    services.steering.set_dose(DoseRequest("mood", 1, mode="ablate"))
    _, logits = states(services)
    services.close()
    again = open_services(tmp_path / "home", "llama" if "llama" in family.lower() else "gpt2")
    try:
        assert torch.equal(logits, states(again)[1])
        mood = direction(again, "mood", 1)
        assert all(float((s @ mood).abs().max()) < 1e-4 for s in states(again)[0].values())
    finally:
        again.close()


@pytest.mark.parametrize(
    "wrong", [{"multiplier": 0.5}, {"multiplier": 1, "combine": "ties"}, {"multiplier": 1, "layers": [1, 2]}]
)
def test_what_an_ablation_cannot_be_is_refused(services: Services, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidEdit, match="ablate"):
        services.steering.set_dose(DoseRequest("mood", mode="ablate", **wrong))  # type: ignore[arg-type]
    assert services.steering.list().active == []
