"""Mixtures of experts: read, traced, edited in all experts that a key reaches, and given back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from editors import METHODS
from editors.closed_form.contexts import target_contexts
from editors.closed_form.values import find_values
from editors.closed_form.varied_rows import VariedRows
from editors.errors import InvalidEdit, Unsupported
from editors.finetune.peft_format import as_adapter
from editors.learned.trained_folder import TrainedFolder
from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams
from editors.locate.lens import direct_attribution
from editors.locate.traced_prompt import embed, run, tokenize_fact
from editors.method import EditContext
from editors.metric import BlockProjector, Metric
from editors.model.activations import record
from editors.model.deltas import Dense, LowRank
from editors.model.lm import LM
from editors.model.recognise import architecture_of
from editors.patch import WeightPatch, save
from editors.patch_kinds import load
from server.models import loading
from server.settings import Settings
from server.transaction.host import ModelHost
from tests.editors.conftest import StatisticsOf
from tests.editors.test_contract import EDITS, active, everything, params_of
from tests.editors.test_more_families import said
from tests.editors.test_steering import dose_of, logits, same, steered, vector_of
from tests.editors.test_varied_rows import check, rows_of
from tests.editors.trained import trained_for
from tests.families import HIDDEN, LAYERS, ROUTED, fresh, make, save_to

STACKED = tuple(f for f in ROUTED if f != "deepseek_v2")  # that one is edited in its shared expert
KINDS = ("rome", "memit", "ft", "grace")
ALL = ("qwen3_moe",)  # every method; of each kind one on the others
FEW = {"qwen3_5_moe": ("rome", "grace"), "qwen3_5_moe_wrapper": ("rome",)}
TRIED = [(f, m) for f in ROUTED for m in (METHODS if f in ALL else FEW.get(f, KINDS))]


def tokens_of(lm: LM, *words: str) -> tuple[Tensor, Tensor]:
    return lm.pad([lm.encode(lm.prompt(w))[0] for w in words])


@pytest.mark.parametrize("family", STACKED)
def test_the_joint_key_times_the_experts_side_by_side_is_what_they_write(family: str) -> None:
    lm = make(family)
    name = lm.mlp_out(2)
    experts = lm.experts[name]
    ids, mask = tokens_of(lm, "The capital of France is", "Big Ben is in")
    with (
        torch.no_grad(),
        record({"key": lm.module(name)}, inputs=True) as keys,
        record({"out": lm.module(name)}) as out,
    ):
        lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    key = keys["key"]
    assert key.shape == (ids.numel(), lm.shape(name)[1])
    used = key.reshape(-1, experts.count, experts.d_inner).abs().amax(-1) > 0
    assert (used.sum(1) == 2).all(), "a token reaches two of the four experts"
    left = out["out"] - key @ lm.weight(name).t()
    if experts.module.has_bias:
        gates = torch.zeros(len(key), experts.count)
        bias = experts.module.down_proj_bias
        gates = torch.linalg.lstsq(bias.t(), left.t()).solution.t()
        left = left - gates @ bias
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", STACKED)
def test_a_change_of_the_experts_adds_what_it_says_to_each_token(family: str) -> None:
    lm = fresh(family)
    host, name = ModelHost(lm), lm.mlp_out(1)
    d_out, d_in = lm.shape(name)
    assert torch.equal(lm.experts[name].stacked(lm.weight(name)), lm.live(name))
    before = everything(lm)
    ids, mask = tokens_of(lm, "The capital of France is")
    modules = {"m": lm.module(name)}

    def written() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), record(modules, inputs=True) as keys, record(modules) as out:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return keys["m"], out["m"]

    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(d_out, 1, generator=generator), torch.randn(1, d_in, generator=generator))
    key, plain = written()
    host.set_stack([active(1, "rome", WeightPatch({name: low}))])
    same_key, moved = written()
    assert torch.equal(same_key, key)
    torch.testing.assert_close(moved - plain, key @ low.dense().t(), rtol=1e-3, atol=1e-3)
    assert host.rehash() == host.weights_hash != host.base_hash
    host.set_stack([])
    assert host.rehash() == host.base_hash
    assert everything(lm) == before


@pytest.mark.parametrize("family", ROUTED)
def test_a_search_for_a_value_sees_the_logits_of_a_full_forward(family: str) -> None:
    lm = make(family)
    rows = rows_of(lm)
    for layer in (0, LAYERS - 1):
        above = VariedRows(lm, layer, rows)
        delta = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            check(lm, layer, rows, above, torch.zeros_like(delta), 2e-4)
            check(lm, layer, rows, above, delta, 2e-4)


@pytest.mark.parametrize(("family", "method"), TRIED)
def test_an_edit_changes_what_it_says_and_nothing_stays_after_it(
    family: str, method: str, statistics_of: StatisticsOf
) -> None:
    lm, same_lm = fresh(family), fresh(family)
    editor = METHODS[method]
    context = EditContext(statistics_of(lm), trained=trained_for(lm) if family in ALL else None)
    before = everything(lm)
    if reason := editor.supports(lm):
        why = {
            **dict.fromkeys(
                ("adalora", "ia3"), "experts of qwen3_moe are none; use lora, rome, memit or constrained"
            ),
            "t_patcher": "has experts instead of one MLP. Use memit, or a memory such as constrained",
        }
        assert why[method] in reason
        return
    patches = [editor.compute(lm, [edit], params_of(editor), context) for edit in EDITS[:2]]
    assert everything(lm) == before
    for each in (lm, same_lm):
        each.extension(TrainedFolder).path = context.trained
    host, other = ModelHost(lm), ModelHost(same_lm)
    host.set_stack([active(1, method, patches[0]), active(2, method, patches[1])])
    assert host.rehash() != host.base_hash or patches[0].kind != "weight"
    host.set_stack([active(2, method, patches[1])])
    other.set_stack([active(2, method, load(save(patches[1])))])
    assert host.rehash() == host.weights_hash == other.rehash()
    assert said(host.lm) == said(other.lm)
    host.set_stack([])
    assert host.rehash() == host.base_hash
    assert everything(lm) == before


@pytest.mark.parametrize("family", ROUTED)
def test_the_edited_layer_writes_the_value_that_was_sought(family: str, statistics_of: StatisticsOf) -> None:
    lm = make(family)
    rome: Any = METHODS["rome"]
    params = rome.params(layer=1, max_steps=5, keys="mean", contexts=1)
    found = find_values(lm, 1, EDITS[:1], params)
    [(name, delta)] = rome.compute(lm, EDITS[:1], params, EditContext(statistics_of(lm))).deltas.items()
    row = target_contexts(lm, EDITS[0], 1)[0].row
    ids, mask = lm.pad([row.ids])
    with lm.patched({name: [delta]}), torch.no_grad(), record({"out": lm.module(name)}) as seen:
        lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    written = seen["out"].reshape(len(row.ids), -1)[row.position]
    assert (found.deltas[0].norm() / found.values[0].norm()) > 0.5
    torch.testing.assert_close(written, found.targets[0], rtol=1e-3, atol=2e-3)


def test_an_edit_changes_only_the_experts_that_its_keys_reach(statistics_of: StatisticsOf) -> None:
    lm = make("mixtral")
    patch = METHODS["rome"].compute(lm, EDITS[:1], params_of(METHODS["rome"]), EditContext(statistics_of(lm)))
    assert isinstance(patch, WeightPatch)
    [(name, delta)] = patch.deltas.items()
    assert isinstance(delta, LowRank)
    experts = lm.experts[name]
    keys = patch.extra[f"{name}:keys"].reshape(-1, experts.count, experts.d_inner)
    reached = keys.abs().amax((0, 2)) > 0
    moved = delta.right.reshape(experts.count, experts.d_inner).abs().amax(1) > 0
    assert moved[reached].all()
    assert torch.allclose(keys.flatten(1) @ delta.right[0], torch.ones(len(keys)), atol=0.2)


@pytest.mark.parametrize("family", ROUTED)
def test_tracing_attribution_and_steering_work_and_leave_the_model_as_it_was(family: str) -> None:
    lm = make(family)
    before, state = logits(lm), everything(lm)
    traced = tokenize_fact(lm, "The capital of France is", "France", "Berlin")
    attention, mlp, embedding, constant = direct_attribution(lm, traced)
    with torch.no_grad():
        states = run(lm, traced, embed(lm, traced), parts=False).hidden[-1][0, traced.last]
    own = lm.head(states).float()
    total = attention.sum() + mlp.sum() + embedding + constant
    torch.testing.assert_close(total, own[traced.target[0]] - own.mean(), atol=2e-3, rtol=2e-3)
    attribution_patching(
        lm, "The capital of France is", "France", None, TraceParams(samples=2), lambda *_: None
    )
    with steered(lm, dose_of("mood", vector_of(lm), 0.5)):
        assert not same(logits(lm), before)
    assert same(logits(lm), before)
    assert everything(lm) == state


def test_second_moments_of_experts_have_a_block_each(statistics_of: StatisticsOf) -> None:
    lm = make("mixtral")
    moment = statistics_of(lm).get(1)
    experts = lm.experts[lm.mlp_out(1)]
    assert moment.matrix.shape == (experts.count, experts.d_inner, experts.d_inner)
    whole = torch.block_diag(*moment.matrix)
    keys = torch.randn(len(whole), 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        Metric.of(moment.matrix, 0.01).solve(keys), Metric.of(whole, 0.01).solve(keys), rtol=1e-3, atol=1e-3
    )
    projector = BlockProjector.of(moment.matrix, 0.02)
    once = projector.solve(keys)
    torch.testing.assert_close(projector.solve(once), once, rtol=1e-3, atol=1e-3)
    assert float((once.t() @ whole @ once).trace()) < 0.05 * float((keys.t() @ whole @ keys).trace())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_an_edited_mixture_saved_whole_loads_with_its_edits(family: str, tmp_path: Path) -> None:
    lm = loading.load(
        Settings(model=str(save_to(family, tmp_path / "m")), home=tmp_path, device="cpu"), lambda *_: None
    )
    name = lm.mlp_out(2)
    delta = Dense(0.05 * torch.randn(lm.shape(name), generator=torch.Generator().manual_seed(0)))
    plain = logits(lm)
    with lm.patched({name: [delta]}):
        edited = logits(lm)
        lm.model.save_pretrained(tmp_path / "whole")
    lm.tokenizer.save_pretrained(tmp_path / "whole")
    again = loading.load(
        Settings(model=str(tmp_path / "whole"), home=tmp_path, device="cpu"), lambda *_: None
    )
    assert not same(edited, plain)
    assert same(logits(again), edited)


def test_what_does_not_fit_experts_says_so_with_a_way_out(statistics_of: StatisticsOf) -> None:
    lm = make("qwen3_moe")
    patch = METHODS["rome"].compute(lm, EDITS[:1], params_of(METHODS["rome"]), EditContext(statistics_of(lm)))
    assert isinstance(patch, WeightPatch)
    with pytest.raises(Unsupported, match=r"experts of a layer.*LoRA.*export as merged"):
        as_adapter(lm, {n: [d] for n, d in patch.deltas.items()}, "base")
    lora: Any = METHODS["lora"]
    with pytest.raises(InvalidEdit, match=r"params\.dora.*experts.*leave it out"):
        lora.resolve(lm, lora.params(dora=True))
    assert METHODS["ia3"].supports(make("deepseek_v2")) is None  # edited in its shared expert


def test_experts_of_a_kind_that_is_not_known_are_named() -> None:
    config: Any = transformers.PhimoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        Unsupported, match=r"phimoe has mixture-of-experts.*known are .*mixtral.*or a dense model"
    ):
        architecture_of(model)
