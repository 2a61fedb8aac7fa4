"""Steering vectors made elsewhere: read from GGUF and safetensors, dosed as the file has them, refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from editors.errors import EditError
from editors.steering import vector_files
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


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors", "v.pt"])
@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x00" * 400, b"x" * 50])
def test_a_damaged_file_is_refused(services: Services, name: str, data: bytes) -> None:
    (imports(services) / name).write_bytes(data)
    with pytest.raises(EditError, match="can be read"):
        services.steering.take_in(name, "v")


def saved(services: Services, name: str, value: Any) -> None:
    torch.save(value, imports(services) / name)


def test_directions_that_torch_saved_act_where_their_authors_added_them(services: Services) -> None:
    lm = services.workspace.lm
    rows = torch.randn(lm.n_layers, lm.d_model)
    saved(services, "vec_layer_2_Llama-2-7b-chat-hf.pt", rows[2].half())  # after layer 2
    saved(services, "direction.pt", rows[1].double())  # read before layer 2, which is after layer 1
    (imports(services) / "direction_metadata.json").write_text('{"pos": -5, "layer": 2}', "utf-8")
    saved(services, "rows.pt", rows)
    saved(services, "by_number.pt", {1: rows[1], 2: rows[2][None]})
    saved(services, "by_name.pt", {"layer.1": torch.nn.Parameter(rows[1])})
    wanted = {
        "vec_layer_2_Llama-2-7b-chat-hf.pt": {2: rows[2].half().float()},
        "direction.pt": {1: rows[1]},
        "rows.pt": dict(enumerate(rows)),
        "by_number.pt": {1: rows[1], 2: rows[2]},
        "by_name.pt": {1: rows[1]},
    }
    for n, (file, added) in enumerate(wanted.items()):
        services.steering.take_in(file, f"v{n}")
        found = control_vectors(vector_named(services.workspace, f"v{n}"), 1.0)
        assert found.keys() == added.keys(), file
        for layer, value in added.items():
            torch.testing.assert_close(found[layer], value)


class Harm:
    """What a pickle of it does when an ordinary reader reads it."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm-was-done"),)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Harm(), "could run code"),
        ({"layer.1": Harm()}, "could run code"),
        ([1, 2], "holds list"),
        ({"layer.1": 3}, "holds dict"),
        (torch.ones(2, 3, 4), "direction.pt"),
        (torch.ones(64), "of which layer"),
        (torch.ones(4, 64, dtype=torch.int64), "floats"),
        (torch.zeros(1).expand(10**9), "at most"),
        (torch.zeros(1).expand(10**6, 800), "at most"),
        (torch.zeros(1).expand(10**5, 8), "a model has fewer layers"),
        ({"layer.1": torch.zeros(1).expand(10**9)}, "at most"),
        (torch.ones(4, 64).to_sparse(), "floats"),
        (torch.ones(4, 64).to_sparse_csr(), "floats"),
        (torch.ones(4, 64, device="meta"), "floats"),
        (torch.ones(4, 64).to(torch.float8_e4m3fn), "floats"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(4)]), "floats"),
    ],
)
def test_what_torch_saved_and_is_no_vector_is_refused_and_runs_nothing(
    services: Services, value: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(services, "v.pt", value)
    with pytest.raises(EditError, match=says):
        services.steering.take_in("v.pt", "v")
    assert services.steering.list().vectors == []
    assert not (tmp_path / "harm-was-done").exists()


def test_a_pt_file_that_unpacks_to_more_than_is_read_is_refused(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(imports(services) / "v.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2 * 2**20))
    monkeypatch.setattr(vector_files, "MAX_FILE", 2**20)
    with pytest.raises(EditError, match="bytes unpacked"):
        services.steering.take_in("v.pt", "v")


def test_other_files_and_taken_names_are_refused(services: Services) -> None:
    (imports(services) / "v.bin").write_bytes(b"x")
    with pytest.raises(ServiceError, match="safetensors"):
        services.steering.take_in("v.bin", "v")
    safetensors.torch.save_file(
        {"layer.1": torch.ones(services.workspace.lm.d_model)}, imports(services) / "v.safetensors"
    )
    services.steering.take_in("v.safetensors", "v")
    with pytest.raises(Conflict, match="replace=true"):
        services.steering.take_in("v.safetensors", "v")
    services.steering.take_in("v.safetensors", "v", replace=True)
