"""Importing: a dry run, a guard, adapters without named facts, and what they do to the active edits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.errors import Conflict, ServiceError
from server.facts.guard import Guard
from server.services import Services
from tests.families import save_to
from tests.server.opened import FACTS, open_services, same, weights

FACT = FACTS[2]


@pytest.fixture
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    """A model with adapters for it in HOME/imports; its family is llama or the fixture's parameter."""
    family = getattr(request, "param", "llama")
    services = open_services(tmp_path / "home", family)
    base = save_to(family, tmp_path / "base")
    for name, strength, config in (
        ("small", 0.001, {"target_modules": ["q_proj"]}),
        ("strong", 2.0, {"target_modules": ["down_proj"]}),
        ("head", 0.05, {"target_modules": ["lm_head"]}),
        ("pissa", 0.0, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
    ):
        adapter(base, tmp_path / "home" / "imports" / name, strength, config)
    yield services
    services.close()


def adapter(base: Path, folder: Path, strength: float, config: dict[str, Any]) -> None:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **config)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def holding_edit(services: Services) -> str:
    report = services.edits.apply([FACT], method="grace")
    assert report.reliability == 1
    return report.edit_ids[0]


def test_a_dry_run_measures_and_keeps_nothing(services: Services) -> None:
    before, events = weights(services), services.workspace.ledger.newest_event()
    report = services.exchange.import_adapter("strong", [FACTS[0]], dry_run=True)
    assert report.status == "previewed"
    assert report.edit_ids == []
    assert report.drift.kl > 0
    assert len(report.results) == 1
    assert same(weights(services), before)
    assert services.workspace.ledger.newest_event() == events


def test_a_bound_that_does_not_hold_rejects_the_import(services: Services) -> None:
    before, stack = weights(services), services.workspace.host.stack
    report = services.exchange.import_adapter("strong", guard=Guard(max_drift=1e-6))
    assert report.status == "rejected"
    assert "max_drift" in report.failed_guard[0]
    assert "Nothing was changed" in report.next
    assert "apply_edits" not in report.next
    assert same(weights(services), before)
    assert services.workspace.host.stack == stack
    assert services.workspace.active_edits == []
    kept = services.exchange.import_adapter("small", guard=Guard(max_drift=1.0))
    assert kept.status == "applied"


@pytest.mark.parametrize(
    ("services", "name"), [("llama", "small"), ("llama", "head"), ("qwen2", "head")], indirect=["services"]
)
def test_an_adapter_without_edits_is_one_entry_that_is_reverted_and_comes_back(
    name: str, services: Services, tmp_path: Path
) -> None:
    before = services.workspace.state_hash
    report = services.exchange.import_adapter(name, source="a colleague")
    [adapter_id] = report.edit_ids
    assert report.results == []
    assert any("no edits were named" in warning for warning in report.warnings)
    assert services.status().active_edits == 1
    changed = services.workspace.state_hash
    assert changed != before
    assert services.edits.audit().edits == []
    with pytest.raises(Conflict, match=f"edit {adapter_id} is active"):
        services.exchange.import_adapter(name)
    with pytest.raises(ServiceError, match="an adapter is passed on as its own folder"):
        services.exchange.export_edits("patches", "bundle")
    assert services.edits.revert([adapter_id]).restored == []
    assert services.workspace.state_hash == before
    assert services.workspace.host.rehash() == services.workspace.host.base_hash
    assert services.edits.reapply([adapter_id]).status == "applied"
    assert services.workspace.state_hash == changed
    services.close()
    again = open_services(tmp_path / "home", services.workspace.lm.name.removeprefix("tiny-"))
    assert again.workspace.state_hash == changed
    assert not again.status().damage
    again.close()


def test_active_edits_that_an_adapter_breaks_are_named(services: Services) -> None:
    held = holding_edit(services)
    quiet = services.exchange.import_adapter("small", dry_run=True)
    assert quiet.no_longer_holding == []
    report = services.exchange.import_adapter("strong", dry_run=True)
    assert report.no_longer_holding == [held]
    assert any(held in warning for warning in report.warnings)


def test_an_untrained_pissa_adapter_changes_nothing_also_on_top_of_an_edit(services: Services) -> None:
    held = holding_edit(services)
    report = services.exchange.import_adapter("pissa")
    assert report.no_longer_holding == []
    edited = services.workspace.drift().kl
    services.edits.revert(report.edit_ids)
    assert services.workspace.drift().kl == pytest.approx(edited, abs=1e-4)
    services.edits.revert([held])
    services.exchange.import_adapter("pissa")
    assert services.workspace.drift().kl < 1e-4


def test_a_bundle_has_a_dry_run_and_a_guard_too(services: Services, tmp_path: Path) -> None:
    held = holding_edit(services)
    services.exchange.export_edits("patches", "facts")
    services.edits.revert([held])
    before = services.workspace.state_hash
    assert services.exchange.import_patches("facts.zip", dry_run=True).status == "previewed"
    rejected = services.exchange.import_patches("facts.zip", guard=Guard(min_chat_reworded=1.0))
    assert rejected.status == "rejected"
    assert services.workspace.state_hash == before
    assert services.exchange.import_patches("facts.zip").status == "applied"
