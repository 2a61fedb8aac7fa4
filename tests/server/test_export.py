"""Edits that leave the house: what others load is the live model, and nothing is ever overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from editors.finetune.peft_format import joined, recompressed
from editors.model.deltas import Dense, LowRank
from server.errors import ServiceError
from server.exchange.exporting import export
from server.exchange.files import check_name
from server.exchange.results import ExportReport
from server.request_context import RequestContext
from server.services import Services
from tests import device
from tests.families import save_to
from tests.server.opened import FACTS, STRONG, open_services

PROMPTS = ["The capital of France is", "The language of Spain is", "Once upon a time there was a king"]


def leave(services: Services, format: Any, name: str, **more: Any) -> ExportReport:
    given = {"edit_ids": None, "max_rank": None} | more
    return export(services.workspace, format, name, ctx=RequestContext(), **given)


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def services(tmp_path: Path, family: str) -> Any:
    """e1 to e3 applied in two calls, e2 reverted."""
    opened = open_services(tmp_path / "home", family)
    opened.edits.apply(FACTS[:2], method="rome", params=STRONG)
    opened.edits.apply(FACTS[2:], method="rome", params=STRONG | {"layer": 2}, reason="it | changed")
    opened.edits.revert(["e2"])
    yield opened
    opened.close()


def live_logits(services: Services) -> torch.Tensor:
    return logits(services.workspace.host.lm.model, services.workspace.host.lm.tokenizer)


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    model.to(device.chosen)  # to the live one, whose numbers it shall have to the bit
    asked = [tokenizer(p, return_tensors="pt").to(device.chosen) for p in PROMPTS]
    return torch.cat([model(**inputs).logits[0] for inputs in asked])


def assert_live(model: Any, tokenizer: Any, services: Services) -> None:
    """The exported model is the live one to the bit: its weights, and on the CPU what it says too.

    Elsewhere a weight that lies in memory another way (GPT-2's) may be multiplied by another kernel.
    """
    live = services.workspace.host.lm.model.state_dict()
    state = model.to(device.chosen).state_dict()
    assert state.keys() == live.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in state.items())
    tolerance = 0.0 if device.chosen == "cpu" else 1e-4
    torch.testing.assert_close(
        logits(model, tokenizer), live_logits(services), atol=tolerance, rtol=tolerance
    )


def test_plain_peft_loads_a_lora_export_to_the_live_model(
    services: Services, family: str, tmp_path: Path
) -> None:
    report = leave(services, "lora", "two-facts")
    base = AutoModelForCausalLM.from_pretrained(save_to(family, tmp_path / "base"))
    assert (logits(base, services.workspace.host.lm.tokenizer) - live_logits(services)).abs().max() > 0.01
    loaded = peft.PeftModel.from_pretrained(base, report.path)
    assert (logits(loaded, services.workspace.host.lm.tokenizer) - live_logits(services)).abs().max() < 1e-4
    assert sorted(report.ranks.values()) == [1, 1]  # e2 is not in it
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4


def test_a_lora_export_leaves_with_its_base_model_on_request_and_can_be_moved(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = leave(services, "lora", "both", with_base=True)
    assert report.base == str(Path(report.path) / "base")
    assert report.base in report.next
    moved = shutil.copytree(report.path, tmp_path / "moved")
    monkeypatch.chdir(moved)
    model = AutoPeftModelForCausalLM.from_pretrained(moved)  # by the base that the adapter names
    assert (logits(model, services.workspace.host.lm.tokenizer) - live_logits(services)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(report.base).name_or_path
    card = (moved / "README.md").read_text("utf-8")
    assert "base_model: base\n" in card
    assert "Load the adapter with the folder `base` beside it" in card
    assert str(tmp_path) not in card + (moved / "adapter_config.json").read_text("utf-8")
    with services.workspace.host.pristine():
        alone = AutoModelForCausalLM.from_pretrained(report.base)
        assert_live(alone, AutoTokenizer.from_pretrained(report.base), services)
    with pytest.raises(ServiceError, match="with_base is for"):
        leave(services, "merged", "no", with_base=True)
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash


def test_plain_transformers_loads_a_merged_export_to_the_live_model(services: Services) -> None:
    report = leave(services, "merged", "whole")
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, AutoTokenizer.from_pretrained(report.path), services)
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash == report.weights_hash


def test_a_large_model_is_saved_in_shards(services: Services) -> None:
    report = export(services.workspace, "merged", "shards", None, None, RequestContext(), shard="20KB")
    assert len([f for f in report.files if f.endswith(".safetensors")]) > 2
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, services.workspace.host.lm.tokenizer, services)


def test_chosen_edits_leave_as_if_the_others_had_never_been(services: Services, tmp_path: Path) -> None:
    before = services.workspace.host.rehash()
    report = leave(services, "merged", "e3-alone", edit_ids=["e3"])
    assert services.workspace.host.rehash() == before
    services.edits.revert(["e1"])
    assert report.weights_hash == services.workspace.host.weights_hash
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, services.workspace.host.lm.tokenizer, services)


def test_the_sums_and_the_card_tell_what_is_in_an_export(services: Services) -> None:
    report = leave(services, "lora", "told")
    folder = Path(report.path)
    sums = (folder / "SHA256SUMS").read_text()
    assert hashlib.sha256(sums.encode()).hexdigest() == report.sha256
    for line in sums.splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert sorted(p.name for p in folder.iterdir()) == sorted(report.files)
    assert sum(p.stat().st_size for p in folder.iterdir()) == report.bytes
    card = (folder / "README.md").read_text()
    assert "| e1 | The capital of France is | Rome |" in card
    assert "| e2 |" not in card
    row = next(line for line in card.splitlines() if line.startswith("| e1 |"))
    before, after, shares = (cell.strip() for cell in row.split("|")[4:7])
    assert before
    assert after
    assert len(shares.split(", ")) == 2
    assert "it &#124; changed" in card
    told = json.loads((folder / "errata.json").read_text())
    assert [e["id"] for e in told["edits"]] == report.edit_ids == ["e1", "e3"]


def test_recompression_is_told_with_its_error(services: Services) -> None:
    services.edits.reapply(["e2"])
    exact = leave(services, "lora", "exact")
    cut = leave(services, "lora", "cut", max_rank=1)
    assert max(exact.ranks.values()) == 2
    assert exact.recompression_error is None
    assert set(cut.ranks.values()) == {1}
    assert cut.recompression_error is not None
    assert 0 < cut.recompression_error < 1
    assert cut.warnings


def test_nothing_is_ever_overwritten(services: Services) -> None:
    path = Path(leave(services, "lora", "once").path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for format in ("lora", "merged"):
        with pytest.raises(ServiceError, match="already has 'once'"):
            leave(services, format, "once")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["once"]


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "..", ".hidden", "a\\b", "", "CON", "a\n", "x" * 81, "end."]
)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ServiceError, match="cannot be used"):
        check_name(name)


def test_a_linked_exports_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    services = open_services(tmp_path / "home")
    services.edits.apply(FACTS[:1], method="rome", params=STRONG)
    (tmp_path / "home" / "exports").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServiceError, match="is a link"):
        leave(services, "lora", "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    services.close()


def test_with_nothing_active_there_is_nothing_to_export(services: Services) -> None:
    with pytest.raises(
        ServiceError, match=r"e2 is reverted.*reapply_edits\(\['e2'\]\) makes it active again"
    ):
        leave(services, "lora", "none", edit_ids=["e2"])
    services.edits.reapply(["e2"])
    assert leave(services, "lora", "again", edit_ids=["e2"]).edit_ids == ["e2"]
    services.edits.revert(["e2"])
    services.edits.revert(["e1", "e3"])
    with pytest.raises(ServiceError, match="no edit is active"):
        leave(services, "patches", "none")
    assert [p.name for p in (services.workspace.settings.home / "exports").iterdir()] == ["again"]


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dense=st.booleans(),
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    seed=st.integers(0, 1000),
)
def test_joined_factors_are_the_sum_of_the_deltas(
    ranks: list[int], dense: bool, shape: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    deltas: list[Any] = [LowRank(noise(shape[0], r), noise(r, shape[1])) for r in ranks]
    deltas += [Dense(noise(*shape))] * dense
    total = sum(d.dense() for d in deltas)
    factors = joined(deltas)
    assert torch.allclose(factors.dense(), total, atol=1e-4)
    assert factors.left.shape[1] <= min(shape)
    cut, error = recompressed(factors, 1)
    best = torch.linalg.svdvals(total.double())
    assert error == pytest.approx(float(best[1:].norm() / best.norm()), abs=1e-4)
    assert float((cut.dense() - total).norm() / total.norm()) == pytest.approx(error, abs=1e-3)
