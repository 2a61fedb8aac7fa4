"""Steering vectors made elsewhere: read from GGUF and safetensors, dosed as the file has them, refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from editors.errors import EditError
from editors.steering.pairs import Pair
from editors.steering.vector import control_vectors
from server.errors import Conflict, ServiceError
from server.services import Services
from server.steering.requests import DoseRequest, VectorRequest
from server.steering.stored import vector_named
from tests.server.opened import open_services, same, weights

PAIRS = [
    Pair(prompt="Rome", positive="good", negative="bad"),
    Pair(prompt="Oslo", positive="yes", negative="no"),
]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = open_services(tmp_path / "home")
    (tmp_path / "home" / "imports").mkdir()
    yield services
    services.close()


def imports(services: Services) -> Path:
    return services.workspace.settings.home / "imports"


def logits(services: Services) -> torch.Tensor:
    lm = services.workspace.lm
    ids = torch.tensor([lm.encode(lm.prompt("The capital of France is"))[0]])
    with torch.no_grad():
        found: torch.Tensor = lm.model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_a_vector_that_was_exported_comes_back_at_the_same_dose(services: Services, format: Any) -> None:
    services.steering.create(VectorRequest(name="mood", pairs=PAIRS, layers=[1, 2]))
    services.steering.export("mood", format, "out", 0.5)
    report = services.steering.take_in(f"exports/out.{format}", "again")
    assert (report.layers, report.method) == ([1, 2], "imported")
    wanted = control_vectors(vector_named(services.workspace, "mood"), 0.5)
    added = control_vectors(vector_named(services.workspace, "again"), 1.0)
    for layer in (1, 2):
        torch.testing.assert_close(added[layer], wanted[layer])
    before, plain = weights(services), logits(services)
    services.steering.set_dose(DoseRequest(name="again", multiplier=1.0))
    once = logits(services)
    services.steering.set_dose(DoseRequest(name="again", multiplier=0))
    services.steering.set_dose(DoseRequest(name="mood", multiplier=0.5))
    torch.testing.assert_close(once, logits(services))
    services.steering.set_dose(DoseRequest(name="mood", multiplier=0))
    assert torch.equal(plain, logits(services))
    assert same(before, weights(services))


def test_one_tensor_of_all_layers_is_read(services: Services) -> None:
    lm = services.workspace.lm
    rows = torch.randn(lm.n_layers, lm.d_model)
    safetensors.torch.save_file({"vector": rows}, imports(services) / "rows.safetensors")
    services.steering.take_in("rows.safetensors", "rows")
    added = control_vectors(vector_named(services.workspace, "rows"), 1.0)
    for layer in range(lm.n_layers):
        torch.testing.assert_close(added[layer], rows[layer])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lambda d: {"layer.1": torch.randn(d + 1)}, "another model"),
        (lambda d: {"layer.99": torch.randn(d)}, "layers 0 to"),
        (lambda d: {"layer.1": torch.full((d,), float("nan"))}, "not finite"),
        (lambda d: {"layer.1": torch.zeros(d)}, "not zero"),
        (lambda d: {"weird": torch.randn(d), "other": torch.randn(d)}, "direction.N"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_by_what_is_wrong(
    services: Services, tensors: Callable[[int], dict[str, torch.Tensor]], says: str
) -> None:
    safetensors.torch.save_file(tensors(services.workspace.lm.d_model), imports(services) / "v.safetensors")
    with pytest.raises(EditError, match=says):
        services.steering.take_in("v.safetensors", "v")
    assert services.steering.list().vectors == []


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors"])
@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x00" * 400, b"x" * 50])
def test_a_damaged_file_is_refused(services: Services, name: str, data: bytes) -> None:
    (imports(services) / name).write_bytes(data)
    with pytest.raises(EditError, match="can be read"):
        services.steering.take_in(name, "v")


def test_pickled_files_and_taken_names_are_refused(services: Services) -> None:
    (imports(services) / "v.pt").write_bytes(b"x")
    with pytest.raises(ServiceError, match="safetensors"):
        services.steering.take_in("v.pt", "v")
    safetensors.torch.save_file(
        {"layer.1": torch.ones(services.workspace.lm.d_model)}, imports(services) / "v.safetensors"
    )
    services.steering.take_in("v.safetensors", "v")
    with pytest.raises(Conflict, match="replace=true"):
        services.steering.take_in("v.safetensors", "v")
    services.steering.take_in("v.safetensors", "v", replace=True)
