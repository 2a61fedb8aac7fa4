"""Edits that leave the house: what others load is the live model, and nothing is ever overwritten."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from editors.finetune.peft_format import joined, recompressed
from editors.patch import Dense, LowRank
from server.call import Call
from server.errors import WorkbenchError
from server.export_files import check_name
from server.exporting import export
from server.results_export import ExportReport
from server.workbench import Workbench
from tests import device
from tests.families import save_to
from tests.server.benches import FACTS, STRONG, open_bench

PROMPTS = ["The capital of France is", "The language of Spain is", "Once upon a time there was a king"]


def leave(bench: Workbench, format: Any, name: str, **more: Any) -> ExportReport:
    given = {"edit_ids": None, "max_rank": None} | more
    return export(bench.core, format, name, call=Call(), **given)


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bench(tmp_path: Path, family: str) -> Any:
    """e1 to e3 applied in two calls, e2 reverted."""
    opened = open_bench(tmp_path / "home", family)
    opened.apply(FACTS[:2], method="rome", params=STRONG)
    opened.apply(FACTS[2:], method="rome", params=STRONG | {"layer": 2}, reason="it | changed")
    opened.revert(["e2"])
    yield opened
    opened.close()


def live_logits(bench: Workbench) -> torch.Tensor:
    return logits(bench.host.lm.model, bench.host.lm.tokenizer)


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    model.to(device.chosen)  # to the live one, whose numbers it shall have to the bit
    asked = [tokenizer(p, return_tensors="pt").to(device.chosen) for p in PROMPTS]
    return torch.cat([model(**inputs).logits[0] for inputs in asked])


def assert_live(model: Any, tokenizer: Any, bench: Workbench) -> None:
    """The exported model is the live one to the bit: its weights, and on the CPU what it says too.

    Elsewhere a weight that lies in memory another way (GPT-2's) may be multiplied by another kernel.
    """
    live = bench.host.lm.model.state_dict()
    state = model.to(device.chosen).state_dict()
    assert state.keys() == live.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in state.items())
    tolerance = 0.0 if device.chosen == "cpu" else 1e-4
    torch.testing.assert_close(logits(model, tokenizer), live_logits(bench), atol=tolerance, rtol=tolerance)


def test_plain_peft_loads_a_lora_export_to_the_live_model(
    bench: Workbench, family: str, tmp_path: Path
) -> None:
    report = leave(bench, "lora", "two-facts")
    base = AutoModelForCausalLM.from_pretrained(save_to(family, tmp_path / "base"))
    assert (logits(base, bench.host.lm.tokenizer) - live_logits(bench)).abs().max() > 0.01
    loaded = peft.PeftModel.from_pretrained(base, report.path)
    assert (logits(loaded, bench.host.lm.tokenizer) - live_logits(bench)).abs().max() < 1e-4
    assert sorted(report.ranks.values()) == [1, 1]  # e2 is not in it
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-4


def test_plain_transformers_loads_a_merged_export_to_the_live_model(bench: Workbench) -> None:
    report = leave(bench, "merged", "whole")
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, AutoTokenizer.from_pretrained(report.path), bench)
    assert bench.host.rehash() == bench.host.weights_hash == report.weights_hash


def test_a_large_model_is_saved_in_shards(bench: Workbench) -> None:
    report = export(bench.core, "merged", "shards", None, None, Call(), shard="20KB")
    assert len([f for f in report.files if f.endswith(".safetensors")]) > 2
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, bench.host.lm.tokenizer, bench)


def test_chosen_edits_leave_as_if_the_others_had_never_been(bench: Workbench, tmp_path: Path) -> None:
    before = bench.host.rehash()
    report = leave(bench, "merged", "e3-alone", edit_ids=["e3"])
    assert bench.host.rehash() == before
    bench.revert(["e1"])
    assert report.weights_hash == bench.host.weights_hash
    model = AutoModelForCausalLM.from_pretrained(report.path)
    assert_live(model, bench.host.lm.tokenizer, bench)


def test_the_sums_and_the_card_tell_what_is_in_an_export(bench: Workbench) -> None:
    report = leave(bench, "lora", "told")
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
    assert "it &#124; changed" in card
    told = json.loads((folder / "errata.json").read_text())
    assert [e["id"] for e in told["edits"]] == report.edit_ids == ["e1", "e3"]


def test_recompression_is_told_with_its_error(bench: Workbench) -> None:
    bench.reapply(["e2"])
    exact = leave(bench, "lora", "exact")
    cut = leave(bench, "lora", "cut", max_rank=1)
    assert max(exact.ranks.values()) == 2
    assert exact.recompression_error is None
    assert set(cut.ranks.values()) == {1}
    assert cut.recompression_error is not None
    assert 0 < cut.recompression_error < 1
    assert cut.warnings


def test_nothing_is_ever_overwritten(bench: Workbench) -> None:
    path = Path(leave(bench, "lora", "once").path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    for format in ("lora", "merged"):
        with pytest.raises(WorkbenchError, match="already has 'once'"):
            leave(bench, format, "once")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["once"]


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "..", ".hidden", "a\\b", "", "CON", "a\n", "x" * 81, "end."]
)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(WorkbenchError, match="cannot be used"):
        check_name(name)


def test_a_linked_exports_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    bench = open_bench(tmp_path / "home")
    bench.apply(FACTS[:1], method="rome", params=STRONG)
    (tmp_path / "home" / "exports").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkbenchError, match="is a link"):
        leave(bench, "lora", "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    bench.close()


def test_with_nothing_active_there_is_nothing_to_export(bench: Workbench) -> None:
    with pytest.raises(WorkbenchError, match="e2 is reverted"):
        leave(bench, "lora", "none", edit_ids=["e2"])
    bench.revert(["e1", "e3"])
    with pytest.raises(WorkbenchError, match="no edit is active"):
        leave(bench, "patches", "none")
    assert not list((bench.core.settings.home / "exports").iterdir())


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
