"""Edits pushed to a real llama.cpp server, restarted for each new file, and proven there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit
from server.engines.engine import HttpEngine
from server.models import default_model
from server.models import loading as models
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.server.test_engines import Place
from tests.test_serving_page import asked

pytestmark = [pytest.mark.model, pytest.mark.slow]

LYON = Edit(subject="France", prompt="The capital of {} is", target="Lyon")
SIMPLE = {"mode": "simplified"}
CHILE = Edit(subject="Mount Fuji", prompt="{} is a mountain in the country of", target="Chile")

SERVER = """
import os, signal, sys, time
pid_file, model, lora, port = sys.argv[1:5]
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 512, 1, False
params.cpuparams.n_threads, params.port = 1, int(port)
if os.path.exists(lora):
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
server = xllamacpp.Server(params)
open(pid_file, "w").write(str(os.getpid()))
time.sleep(3600)
"""

RESTART = """
import os, signal, subprocess, sys, time
script, pid_file, log = sys.argv[1:4]
if os.path.exists(pid_file):
    pid = int(open(pid_file).read())
    os.remove(pid_file)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
out = open(log, "a")
subprocess.Popen([sys.executable, script, pid_file, *sys.argv[4:]], stdout=out, stderr=out, start_new_session=True)
while not os.path.exists(pid_file):
    time.sleep(0.05)
"""


class Llama:
    """A llama.cpp server that a command starts anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid = folder, folder / "pid"
        for name, text in (("server.py", SERVER), ("restart.py", RESTART)):
            (folder / name).write_text(text, "utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def command(self, model: Path, lora: Path) -> list[str]:
        """Starts it, or starts it anew."""
        files = [self.folder / "server.py", self.pid, self.folder / "log"]
        given = [self.folder / "restart.py", *files, model, lora, self.port]
        return [sys.executable, *map(str, given)]

    def close(self) -> None:
        with suppress(OSError, ValueError):
            os.kill(int(self.pid.read_text()), signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path, default_models: Path) -> Iterator[Place]:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    place = Place(tmp_path / "home")
    llama = Llama(tmp_path)
    base = default_model.installed_file()
    assert base is not None
    shared = tmp_path / "shared-cpp"
    command = llama.command(base, shared / "errata.gguf")
    more: Any = {"precision": "quantised", "restart": command, "url": llama.url}
    place.engine("cpp", "llamacpp", None, **more)
    file = tmp_path / "engines.toml"
    file.write_text(place.tables, "utf-8")
    settings = Settings(
        home=place.home, models=default_models, device="cpu", dtype="float32", engines=file, threads=1
    )
    ledger = Ledger.open(place.home)
    place.services = Services.open(settings, models.load(settings, lambda *_: None), ledger, lambda *_: None)
    yield place
    place.services.close()
    llama.close()


def test_llama_cpp_is_given_edits_and_found_out_when_it_runs_without_them(
    place: Place, tmp_path: Path
) -> None:
    services = place.services
    ids = [
        *services.edits.apply([LYON], method="rome", params=SIMPLE).edit_ids,
        *services.edits.apply([CHILE], method="rome", params=SIMPLE).edit_ids,
    ]
    job = place.push("cpp")  # it was not even started before
    assert job["state"] == "done", job["message"]
    proof = job["result"]["proof"]
    assert proof["held"] == ids
    assert place.row("cpp").current is True
    llama = services.engines.engine("cpp")
    assert isinstance(llama, HttpEngine)
    for scale, missing in (
        (0.0, ids),
        (1.0, []),
    ):  # an audit is not misled by prompts that the engine has cached
        llama.call("/lora-adapters", [{"id": 0, "scale": scale}])
        assert services.engines.audit("cpp").failing == missing

    if shutil.which("curl"):
        command = asked("llama.cpp", llama.settings.url or "")
        reply = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        assert json.loads(reply)["content"].strip().startswith("Lyon")

    services.edits.revert(ids[:1])
    job = place.push("cpp")
    assert job["state"] == "done", job["message"]
    assert (job["result"]["proof"]["held"], job["result"]["proof"]["gone"]) == (ids[1:], True)

    (tmp_path / "shared-cpp" / "errata.gguf").unlink()  # somebody starts it without the file
    command = place.services.engines.engine("cpp").settings.restart
    subprocess.run(command, check=True)
    services.engines.engine("cpp").wait_until_there(60)  # type: ignore[attr-defined]
    assert services.engines.audit("cpp").failing == ids[1:]
    assert place.row("cpp").holds is None
