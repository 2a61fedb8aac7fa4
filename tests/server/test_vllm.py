"""Edits pushed to a real vLLM and proven there.

    TEST_VLLM=/path/to/bin/vllm pytest tests/server/test_vllm.py

Opt-in: the variable names the program, of an environment of its own. The default model in float32, one server for all.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from editors.edit import Edit
from server.engines.artefacts import Artefact
from server.engines.engine import EngineError, HttpEngine
from server.engines.vllm import VllmWeights
from server.models import default_model
from server.models import loading as models
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.server.test_engines import Place
from tests.test_serving_page import asked, blocks

PROGRAM = os.environ.get("TEST_VLLM", "")
pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="TEST_VLLM does not name a vllm program"),
]

LYON = Edit(subject="France", prompt="The capital of {} is", target="Lyon")
CHILE = Edit(subject="Mount Fuji", prompt="{} is a mountain in the country of", target="Chile")
SIMPLE = {"mode": "simplified"}
START = 300.0
"""Seconds for its start, on a busy machine."""
QUICK = 5.0
"""Seconds from the call that pushes to the proof, on a running engine."""


def tried() -> list[list[str]]:
    """The commands of docs/serving.md that are said to be tried, as words."""
    (block,) = [block for block in blocks("sh") if block.startswith("export VLLM")]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


class Vllm:
    """A vLLM server of the default model."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.log = model, folder / "vllm.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; whoever asks waits by `wait_until_there`."""
        (exports, serve, _) = tried()
        env = {
            **os.environ,
            **dict(pair.split("=", 1) for pair in exports[1:]),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        flags = [*serve[3:], "--host", "127.0.0.1", "--port", str(self.port)]
        command = [PROGRAM, "serve", str(self.model), *flags]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def stop(self) -> None:
        """End it with all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None


@pytest.fixture(scope="module")
def place(default_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Services whose engines `lora` and `weights` are one running vLLM."""
    root = tmp_path_factory.mktemp("vllm")
    place = Place(root / "home")
    model = default_model.folder(default_models).resolve()
    vllm = Vllm(model, root)
    vllm.start()
    place.engine("lora", "vllm_lora", url=vllm.url, model="BASE", max_rank=8)
    place.engine("weights", "vllm_weights", url=vllm.url, model="BASE", base=str(model))
    # `astray` is given paths that the engine does not have.
    place.engine(
        "astray", "vllm_weights", url=vllm.url, model="BASE", base=str(model), folder_there="/no/such/place"
    )
    file = root / "engines.toml"
    file.write_text(place.tables, "utf-8")
    settings = Settings(
        home=place.home, models=default_models, device="cpu", dtype="float32", engines=file, threads=1
    )
    ledger = Ledger.open(place.home)
    place.services = Services.open(settings, models.load(settings, lambda *_: None), ledger, lambda *_: None)
    place.vllm = vllm  # type: ignore[attr-defined]
    try:
        there(place)
        yield place
    finally:
        place.services.close()
        vllm.stop()


def there(place: Place) -> HttpEngine:
    """Wait until it answers, its first request included, which compiles."""
    engine = place.services.engines.engine("weights")
    assert isinstance(engine, VllmWeights)
    engine.wait_until_there(START)
    engine.call("/v1/completions", {"model": "BASE", "prompt": "The", "max_tokens": 2}, timeout=START)
    return engine


@pytest.fixture
def clean(place: Place) -> Iterator[Place]:
    """The engine's own weights are the base model's again afterwards."""
    yield place
    place.services.engines.engine("weights").take_off()


def active(place: Place) -> list[str]:
    """The active edits: at least one."""
    services = place.services
    if not services.workspace.active_edits:
        services.edits.apply([CHILE], method="rome", params=SIMPLE)
    return [record.id for record in services.workspace.active_edits]


def landed(place: Place, engine: str, ids: list[str]) -> dict[str, Any]:
    """Push; what the job found, which must be that the engine holds just these edits."""
    job = place.push(engine)
    assert job["state"] == "done", job["message"]
    result: dict[str, Any] = job["result"]
    proof: dict[str, Any] = result["proof"]
    assert proof["proven"] is True
    assert proof["held"] == ids
    assert proof["worst"] < 1e-3
    assert proof["same_answers"] == 1
    assert place.row(engine).current is True
    return result


def test_a_lora_is_loaded_replaced_in_place_and_unloaded(clean: Place) -> None:
    services = clean.services
    first = active(clean)
    landed(clean, "lora", first)
    second = services.edits.apply([LYON], method="rome", params=SIMPLE).edit_ids
    result = landed(clean, "lora", [*first, *second])
    assert result["before"]["proven"] is False
    assert set(second) <= set(result["before"]["missing"])  # the engine has what it was given before
    vllm: Vllm = clean.vllm  # type: ignore[attr-defined]
    command = asked("vLLM", vllm.url)
    reply = subprocess.run(command, check=True, capture_output=True, timeout=START).stdout
    assert json.loads(reply)["choices"][0]["text"].strip().startswith("Lyon")
    services.edits.revert(second)
    result = landed(clean, "lora", first)
    assert result["proof"]["gone"] is True
    assert services.engines.audit("lora").failing == []
    services.engines.engine("lora").take_off()
    assert services.engines.audit("lora").failing == first
    assert clean.row("lora").holds is None


def test_weights_are_reloaded_and_taken_back(clean: Place) -> None:
    ids = active(clean)
    landed(clean, "weights", ids)
    clean.services.edits.revert(ids)
    landed(clean, "weights", [])
    clean.services.edits.reapply(ids)
    landed(clean, "weights", ids)


def test_a_push_that_breaks_the_engine_is_taken_back(clean: Place) -> None:
    ids = active(clean)
    job = clean.push("astray")  # the engine has no such folder: it breaks while /health says 200
    assert job["state"] == "failed"
    result = job["result"]
    assert "collective_rpc" in result["problem"]
    assert (result["rolled_back"], result["restored"]) == (True, True)
    assert clean.row("astray").holds is None
    landed(clean, "weights", ids)


def test_an_adapter_for_other_modules_is_found_out(clean: Place, tmp_path: Path) -> None:
    ids = active(clean)
    version = landed(clean, "lora", ids)["version"]
    engine = clean.services.engines.engine("lora")
    assert engine.settings.folder is not None
    shutil.copytree(engine.settings.folder / version, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    named = {name.replace("layers.", "layers.9"): t for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(named, file, metadata={"format": "pt"})
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace("layers.", "layers.9"), "utf-8")
    engine.take_off()
    with suppress(EngineError):  # refused, or accepted and without effect
        engine.put(Artefact(tmp_path / "other", "lora", {}, {}, ()))
    assert clean.services.engines.audit("lora").failing == ids
    landed(clean, "lora", ids)


@pytest.mark.parametrize(
    ("engine", "targets"), [("lora", ("Nice", "Lille", "Rouen")), ("weights", ("Metz", "Brest"))]
)
def test_an_edit_is_proven_on_a_running_engine_in_seconds(
    clean: Place, engine: str, targets: tuple[str, ...]
) -> None:
    ids = active(clean)
    landed(clean, engine, ids)
    took = []
    for (
        target
    ) in targets:  # others for each engine: what the model here says is not known from the push before
        fresh = clean.services.edits.apply(
            [LYON.model_copy(update={"target": target})], method="rome", params=SIMPLE
        ).edit_ids
        assert fresh
        took.append(landed(clean, engine, [*ids, *fresh])["seconds"])
        clean.services.edits.revert(fresh)
    again = landed(clean, engine, ids)["seconds"]
    print(f"{engine}: new edits {took}, an edit taken off {again} s from the push to the proof")  # noqa: T201
    assert min(took) < QUICK


def test_an_engine_that_was_restarted_without_its_edits_is_found_and_mended(clean: Place) -> None:
    engines = clean.services.engines
    ids = active(clean)
    landed(clean, "lora", ids)
    landed(clean, "weights", ids)
    vllm: Vllm = clean.vllm  # type: ignore[attr-defined]
    vllm.stop()
    assert engines.audit("lora").failing == ids
    assert clean.row("lora").reachable is False
    vllm.start()
    there(clean)
    for engine in ("lora", "weights"):
        assert engines.audit(engine).failing == ids
        assert clean.row(engine).reachable is True
        assert clean.row(engine).holds is None
    landed(clean, "lora", ids)
    assert engines.audit("weights").failing == ids  # the adapter is beside the model itself
    landed(clean, "weights", ids)
