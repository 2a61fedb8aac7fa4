"""A quantised model behind the server: replay, kill, another state of the same home, exports."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from server.errors import ServiceError
from server.services import Services
from tests.families import save_to
from tests.server.opened import FACTS, QUICK, apply, open_services
from tests.server.processes import Wire

HOW = ["llama-nf4", "llama-int8"]


def state(services: Services) -> tuple[str, str]:
    status = services.status()
    assert services.workspace.host.rehash() == status.weights_hash
    assert not status.damage
    return str(status.weights_hash), str(status.state_hash)


@pytest.mark.parametrize("family", HOW)
def test_side_cars_come_back_from_the_ledger_and_go_in_any_order(family: str, tmp_path: Path) -> None:
    services = open_services(tmp_path, family)
    assert services.status().dtype == f"{family.removeprefix('llama-')} in float32"
    base = state(services)
    ids = [apply(services, fact)[0] for fact in FACTS]
    three = state(services)
    services.close()
    services = open_services(tmp_path, family)
    assert state(services) == three != base
    services.edits.revert([ids[1]])
    two = state(services)
    services.edits.reapply([ids[1]])
    assert state(services) == three
    services.edits.revert([ids[1]])
    assert state(services) == two
    services.edits.revert([ids[0], ids[2]])
    assert state(services) == base
    services.close()


def test_edits_of_the_quantised_model_are_named_on_the_whole_one_and_act_again_after_it(
    tmp_path: Path,
) -> None:
    services = open_services(tmp_path, "llama-nf4")
    apply(services, FACTS[0])
    mine = state(services)
    services.close()
    whole = open_services(tmp_path, "llama")
    assert "1 active edits are of 'tiny-llama-nf4' (llama, nf4 in float32" in whole.status().message
    assert whole.workspace.host.weights_hash == whole.workspace.host.base_hash
    apply(whole, FACTS[1])
    whole.close()
    services = open_services(tmp_path, "llama-nf4")
    assert state(services) == mine
    assert "1 active edits are of 'tiny-llama' (llama, float32" in services.status().message
    services.close()


def test_a_whole_model_cannot_be_exported_and_an_adapter_can(tmp_path: Path) -> None:
    services = open_services(tmp_path, "llama-nf4")
    apply(services, FACTS[0])
    for format in ("merged", "gguf"):
        with pytest.raises(ServiceError, match=rf"\(nf4\) act beside.*exported as {format}.*gguf_lora"):
            services.exchange.export_edits(format, "whole")  # type: ignore[arg-type]
    with pytest.raises(ServiceError, match=r"only as nf4 weights.*leave out with_base"):
        services.exchange.export_edits("lora", "adapter", with_base=True)
    report = services.exchange.export_edits("lora", "adapter")
    assert report.ranks
    assert any("the base as nf4 weights" in warning for warning in report.warnings)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-3
    services.close()


@pytest.mark.slow
def test_a_killed_server_comes_back_with_its_side_cars(tmp_path: Path) -> None:
    model = save_to("llama", tmp_path / "tiny")
    options: dict[str, Any] = {"model": model, "quantize": "nf4", "bounds": "off"}
    edit = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
    with Wire(tmp_path / "home", **options) as wire:
        wire.greet()
        report = wire.told("apply_edits", edits=[edit], method="rome", params=QUICK)
        assert report["status"] == "applied", report
        os.kill(wire.process.pid, signal.SIGKILL)
    with Wire(tmp_path / "home", **options) as wire:
        wire.greet()
        wire.told("list_edits")
        assert wire.told("ask_model", prompt="The capital of France is")["completion"] is not None
        status = wire.told("model_status")
        assert status["weights_hash"] == report["weights_hash"] != status["base_hash"]
        gone = wire.told("revert_edits", edit_ids=report["edit_ids"])
        assert gone["weights_hash"] == status["base_hash"]
