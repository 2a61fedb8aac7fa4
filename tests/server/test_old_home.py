"""The present code opens a home that version 0.1.0 made, and goes on with it (see tests/homes/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from editors.edit import Edit
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.families import fresh
from tests.server.opened import QUICK, open_services, weights

OLD = Path(__file__).parent.parent / "homes" / "0.1.0"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())

NEW = Edit(subject="Kenya", prompt="The capital of {} is", target="Paris")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy: opening a home writes to it."""
    return Path(shutil.copytree(OLD, tmp_path / "home"))


def same_arithmetic(services: Services) -> bool:
    """True if a sum of deltas has the bits here that it had where the home was made."""
    here, there = services.workspace.environment(), EXPECTED["environment"]
    return all(here[name] == there[name] for name in ("torch", "processor", "machine", "device"))


def check_weights(services: Services) -> None:
    """The live weights are those of 0.1.0: bit for bit with the same arithmetic, else within 1e-6."""
    if same_arithmetic(services):
        assert (
            services.workspace.host.rehash()
            == services.workspace.host.weights_hash
            == EXPECTED["weights_hash"]
        )
        assert services.status().state_hash == EXPECTED["state_hash"]
        return
    live = weights(services)
    for name, tensor in load_file(OLD / "weights.safetensors").items():
        torch.testing.assert_close(live[name].cpu(), tensor, atol=1e-6, rtol=1e-6)


def active(services: Services) -> list[str]:
    """Ids of the active edits, newest first."""
    return [row.edit_id for row in services.history.list_edits(status="active", limit=200).edits]


def test_the_weights_statuses_and_answers_are_those_of_0_1_0(home: Path) -> None:
    services = open_services(home)
    try:
        status = services.status()
        assert (status.damage, status.read_only, status.base_hash) == ([], False, EXPECTED["base_hash"])
        check_weights(services)
        assert {row.edit_id: row.status for row in services.history.list_edits(limit=200).edits} == EXPECTED[
            "statuses"
        ]
        assert active(services) == EXPECTED["active"]
        if same_arithmetic(services):
            for prompt, answer in EXPECTED["answers"].items():
                assert services.facts.ask(prompt, max_new_tokens=6).completion == answer
        audit = services.edits.audit()
        assert (audit.integrity.problems, audit.integrity.weights) == ([], True)
        assert services.workspace.ledger.verify() == []
        assert [vector.name for vector in services.workspace.ledger.vectors(1)] == ["mood"]
    finally:
        services.close()


@pytest.mark.parametrize("newest_first", [True, False])
def test_every_edit_can_be_reverted_and_reapplied(home: Path, newest_first: bool) -> None:
    services = open_services(home)
    try:
        ids = active(services) if newest_first else active(services)[::-1]
        for edit_id in ids:
            services.edits.revert([edit_id])
        assert (
            services.workspace.host.rehash() == services.workspace.host.weights_hash == EXPECTED["base_hash"]
        )
        assert active(services) == []
        for edit_id in ids:
            services.edits.reapply([edit_id])
        check_weights(services)
        assert active(services) == EXPECTED["active"]
        assert services.workspace.ledger.verify() == []
    finally:
        services.close()
    again = open_services(home)
    try:
        assert again.status().damage == []
        check_weights(again)
    finally:
        again.close()


def test_a_new_edit_can_be_applied_on_top(home: Path) -> None:
    services = open_services(home)
    try:
        before = services.workspace.host.weights_hash
        report = services.edits.apply([NEW], method="rome", params=dict(QUICK))
        assert (report.status, report.edit_ids) == ("applied", ["e14"])
        assert report.weights_hash != before
        services.edits.revert(["e14"])
        assert services.workspace.host.weights_hash == before
        check_weights(services)
        assert services.workspace.ledger.verify() == []
    finally:
        services.close()


def test_it_opens_read_only_and_is_not_changed(home: Path) -> None:
    before = (home / "ledger.db").read_bytes()
    services = open_services(home, read_only=True)
    try:
        assert services.status().damage == []
        assert services.status().read_only
        check_weights(services)
    finally:
        services.close()
    assert (home / "ledger.db").read_bytes() == before


def test_it_opens_in_another_precision_with_all_of_its_edits(home: Path) -> None:
    first = open_services(home)
    edits = active(first)
    first.close()
    whole = {name: p.data for name, p in fresh("llama").model.named_parameters()}

    def weights_in(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in whole.items()}

    settings, ledger = Settings(home=home), Ledger.open(home)
    other = Services.open(settings, fresh("llama", torch.bfloat16), ledger, lambda *_: None, weights_in)
    try:
        assert active(other) == edits
        assert other.status().active_edits == len(edits) - len(other.status().active_steering)
        assert "rebuilt here on the same weights in bfloat16" in other.status().message
        assert other.status().damage == []
        assert other.edits.audit().integrity.weights
    finally:
        other.close()
    back = open_services(home)
    try:
        check_weights(back)
    finally:
        back.close()
