"""A home opened with another precision, base or tokenizer: nothing is silently off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.model.deltas import LowRank
from editors.patch import WeightPatch, save
from server.errors import ServiceError
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import open_services
from server.transaction.host import ModelHost
from store import NewPatch
from tests.families import fresh, parts, save_to
from tests.server.opened import FACTS, QUICK, apply, same, weights
from tests.server.opened import open_services as opened_in_memory


class Homes:
    """Opens one home on models in folders, as the server does; one at a time."""

    def __init__(self, tmp_path: Path) -> None:
        self.home, self.model = tmp_path / "home", save_to("llama", tmp_path / "tiny")
        self._open: list[Services] = []

    def open(self, dtype: str = "float32", **more: Any) -> Services:
        self.close()
        settings = Settings(
            **{"home": self.home, "model": str(self.model), "device": "cpu", "dtype": dtype, **more}
        )
        services = open_services(settings, lambda done, total, message: None)
        self._open.append(services)
        return services

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Homes]:
    homes = Homes(tmp_path)
    yield homes
    homes.close()


def edit_in_all_ways(services: Services) -> None:
    """Edits in the weights and beside them, and one that was taken back."""
    apply(services, FACTS[0])
    services.edits.apply([FACTS[1]], method="grace", params={"max_steps": 3})
    services.edits.revert(apply(services, FACTS[2]))


def events(services: Services) -> list[str]:
    return [kind for _, kind, _ in services.workspace.ledger.edits_in_events(0)]


@pytest.mark.parametrize(
    ("made", "opened"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_edits_are_rebuilt_on_the_same_weights_in_another_precision(
    made: str, opened: str, homes: Homes
) -> None:
    first = homes.open(made)
    edit_in_all_ways(first)
    before, hash_before, base = weights(first), first.workspace.state_hash, first.workspace.host.base_hash
    patches = [a.patch for a in first.workspace.host.stack]

    other = homes.open(opened)
    status = other.status()
    assert status.active_edits == 2
    assert f"2 active edits were made in {made} and are rebuilt here on the same weights in {opened}" in (
        status.message
    )
    assert not status.read_only
    assert other.workspace.host.base_hash != base
    host = other.workspace.host
    plain = fresh("llama", getattr(torch, opened))
    name = host.changed_tensors()[0]
    rebuilt = plain.weight(name).float() + patches[0].deltas[name].dense()  # type: ignore[attr-defined]
    assert torch.allclose(host.lm.weight(name).float(), rebuilt, atol=1e-2 if opened != "float32" else 1e-6)
    assert events(other)[-1] == "precision"
    assert other.workspace.ledger.verify() == []
    audit = other.edits.audit()
    assert audit.integrity.weights
    assert len(audit.edits) == 2

    count = len(events(other))
    again = homes.open(opened)
    assert len(events(again)) == count
    assert again.status().message == ""
    assert again.workspace.host.weights_hash == host.weights_hash

    back = homes.open(made)
    assert events(back)[-1] == "precision"
    assert f"2 active edits act in {made} again" in back.status().message
    assert back.workspace.state_hash == hash_before
    assert same(weights(back), before)
    assert not back.status().damage


def test_edits_made_and_reverted_in_another_precision_stay_so_in_the_first(homes: Homes) -> None:
    [kept] = apply(homes.open(), FACTS[0])
    other = homes.open("bfloat16")
    [new] = apply(other, FACTS[1])
    other.edits.revert([kept])
    back = homes.open()
    assert [e.id for e in back.workspace.active_edits] == [new]
    back.edits.reapply([kept])
    back.edits.revert([kept, new])
    assert back.workspace.host.rehash() == back.workspace.host.base_hash
    assert homes.open("bfloat16").workspace.host.changed_tensors() == []


def test_what_was_computed_on_a_base_is_used_in_another_precision(homes: Homes) -> None:
    first = homes.open()
    first.workspace.ensure_statistics([1], "self", RequestContext())
    apply(first, FACTS[0])
    other = homes.open("bfloat16")
    assert other.workspace.statistics.missing([1]) == []
    assert other.workspace.base_hash == first.workspace.base_hash


def test_a_home_that_an_earlier_version_opened_in_another_precision_finds_its_edits(homes: Homes) -> None:
    first = homes.open()
    apply(first, FACTS[0])
    stale = fresh("llama", torch.bfloat16)
    first.workspace.ledger.model(ModelHost(stale).base_hash, "tiny", "llama")  # as 0.1.0 left it
    assert homes.open("bfloat16").status().active_edits == 1


def test_a_read_only_server_rebuilds_them_too_and_records_nothing(homes: Homes) -> None:
    apply(homes.open(), FACTS[0])
    homes.open()
    reader = homes.open("bfloat16", read_only=True)
    assert reader.status().active_edits == 1
    assert "rebuilt here" in reader.status().message
    assert "precision" not in events(reader)
    assert reader.workspace.host.changed_tensors()


def test_another_base_is_named_and_there_is_a_way_on(homes: Homes, tmp_path: Path) -> None:
    [old] = apply(homes.open(), FACTS[0])
    homes.close()
    model, _ = parts("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.5)
    model.save_pretrained(homes.model)  # the same folder with other weights: another base of the same name
    changed = homes.open()
    message = changed.status().message
    assert "1 active edits are of 'tiny' (llama, float32, base hash" in message
    assert "do not act on the model that is loaded" in message
    assert "The weights of 'tiny' differ from those that they were made on" in message
    assert "list_edits" in message
    assert "do not act" in changed.edits.audit().next
    with pytest.raises(ServiceError, match="apply_edits with its subject, prompt and target"):
        changed.edits.reapply([old])
    record = changed.workspace.ledger.edits([old])[0]
    anew = FACTS[0].model_copy(update={"target": record.target})
    report = changed.edits.apply([anew], method="rome", params=dict(QUICK))
    assert report.status == "applied"
    assert changed.status().active_edits == 1


def test_a_changed_tokenizer_is_named_with_the_edits_it_concerns(homes: Homes) -> None:
    ids = apply(homes.open(), FACTS[0])
    assert homes.open().status().message == ""
    homes.close()
    _, words = parts("llama")
    words.add_tokens(["Francium"])
    words.save_pretrained(homes.model)
    message = homes.open().status().message
    assert f"the tokenizer is not the one that {ids[0]} were made with" in message
    assert "audit_edits" in message


def test_a_change_of_a_tied_head_that_an_earlier_version_recorded_can_be_reverted(tmp_path: Path) -> None:
    services = opened_in_memory(tmp_path / "home", "qwen2")
    lm, ledger = services.workspace.lm, services.workspace.ledger
    rows, width = lm.model.get_parameter("model.embed_tokens.weight").shape
    blob = save(WeightPatch({"lm_head.weight": LowRank(torch.ones(rows, 1), torch.ones(1, width))}))
    host = services.workspace.host
    request = {"subject": "Oslo", "prompt": "Oslo lies in", "target": "Spain"}
    record = NewPatch(
        model_id=services.workspace.writable_model_id,
        method="lora",
        params={},
        kind="weight",
        blob=blob,
        requests=[request],
        weights_hash_before=host.base_hash,
        weights_hash_after="0" * 64,
        environment=services.workspace.environment(),
    )
    [edit_id] = ledger.record_applied(record)
    services.close()

    again = opened_in_memory(tmp_path / "home", "qwen2")
    assert f"{edit_id} changed one of two modules that share a weight" in again.status().message
    assert not again.workspace.read_only
    assert again.workspace.host.rehash() == again.workspace.host.base_hash  # the embeddings are untouched
    again.close()
    third = opened_in_memory(tmp_path / "home", "qwen2")
    assert third.status().message == ""
    third.edits.revert([edit_id])
    third.edits.reapply([edit_id])
    third.edits.revert([edit_id])
    assert third.workspace.host.stack == ()
    assert third.workspace.ledger.verify() == []
    third.close()
