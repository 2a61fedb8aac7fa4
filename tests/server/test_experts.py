"""A mixture of experts behind the server: applied, replayed, taken back in any order, exported whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editors.errors import EditError
from server.engines.artefacts import write
from server.errors import ServiceError
from tests.server.opened import FACTS, apply, open_services


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_edits_of_experts_come_back_from_the_ledger_and_go_in_any_order(family: str, tmp_path: Path) -> None:
    services = open_services(tmp_path, family)
    base = services.status().weights_hash
    ids = [apply(services, fact)[0] for fact in FACTS]
    memory = services.edits.apply(
        [FACTS[0].model_copy(update={"target": "Madrid"})], method="grace", replace=True
    )
    three = services.status().weights_hash
    services.close()
    services = open_services(tmp_path, family)
    assert services.status().weights_hash == services.workspace.host.rehash() == three != base
    assert not services.status().damage
    services.edits.revert([ids[1]])
    services.edits.reapply([ids[1]])
    assert services.status().weights_hash == three
    services.edits.revert([*ids[1:], *memory.edit_ids])
    assert services.status().weights_hash == services.workspace.host.rehash() == base
    services.close()


def test_edits_of_experts_act_in_another_precision_too(tmp_path: Path) -> None:
    services = open_services(tmp_path, "mixtral", torch.bfloat16)
    ids = apply(services, FACTS[0])
    services.close()
    services = open_services(tmp_path, "mixtral")
    assert "1 active edits were made in bfloat16 and are rebuilt here" in services.status().message
    assert services.status().weights_hash == services.workspace.host.rehash()
    services.edits.revert(ids)
    assert services.status().weights_hash == services.workspace.host.base_hash
    services.close()


def test_experts_leave_as_a_whole_model_and_not_as_an_adapter(tmp_path: Path) -> None:
    services = open_services(tmp_path, "qwen3_moe")
    apply(services, FACTS[0])
    with pytest.raises((ServiceError, EditError), match=r"experts of a layer.*export as merged"):
        services.exchange.export_edits("lora", "adapter")
    with pytest.raises(ServiceError, match=r"experts of a layer.*takes the whole model"):
        write(services.workspace, "tensors", services.workspace.host.stack, tmp_path / "out", None)
    report = services.exchange.export_edits("merged", "whole")
    assert "model.safetensors" in report.files
    services.close()
