"""Models with quantised weights: what is frozen, what acts beside it, and that gradients are those of the weights.

What every method promises on them stands in test_contract.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editors import METHODS
from editors.edit import Edit
from editors.errors import EditError, Unsupported
from editors.finetune.peft_format import as_adapter
from editors.library import applied
from editors.method import EditContext
from editors.model import quantised as quantised_layers
from editors.model.deltas import Dense, LowRank
from editors.model.lm import LM
from editors.model.quantised import SideCar, quantised_modules, settle, tensors_of
from editors.patch import Patch, join_deltas, save
from editors.patch_kinds import load
from server.transaction.host import ModelHost
from tests.editors.conftest import StatisticsOf
from tests.editors.test_contract import active, answers, everything
from tests.editors.trained import trained_for
from tests.families import QUANTISED, fresh, make

EDIT = Edit(subject="France", prompt="The capital of {} is", target="Berlin")
OTHER = Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi")
REST = [f for f in QUANTISED if f != "llama-nf4"]


def dequantised(lm: LM) -> Any:
    """A copy of the model with plain weights: the matrices that the quantised layers multiply by."""
    model = copy.deepcopy(lm.model)
    for name, quantised in lm.quantised.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        d_out, d_in = quantised.shape
        bias = getattr(quantised.module, "bias", None)
        linear = nn.Linear(d_in, d_out, bias=bias is not None)
        linear.weight.data = lm.weight(name).to(lm.dtype)
        if bias is not None:
            linear.bias.data = bias.data.to(lm.dtype)
        setattr(model.get_submodule(parent), child, linear.requires_grad_(False))
    return model


def run(model: Any, lm: LM, states: Tensor) -> Tensor:
    more = {"decoder_input_ids": torch.tensor([[0]])} if lm.is_seq2seq else {}
    logits: Tensor = model(inputs_embeds=states, **more).logits
    return logits.float()


def embedded(lm: LM, words: str = "The capital of France is") -> Tensor:
    ids, _ = lm.encode(lm.prompt(words))
    states: Tensor = lm.model.get_input_embeddings()(torch.tensor([ids])).detach()
    return states


def test_what_acts_beside_a_weight_acts_once_and_is_seen_however_often_the_model_is_wrapped() -> None:
    lm = fresh("llama-nf4")
    name, states = lm.mlp_out(1), embedded(lm)
    delta = LowRank(torch.randn(lm.shape(name)[0], 1), torch.randn(1, lm.shape(name)[1]))
    with lm.patched({name: [delta]}):
        edited, hashes = run(lm.model, lm, states), lm.hashes()
        again = LM(lm.model, lm.tokenizer, "again")
        assert torch.equal(run(again.model, again, states), edited)
        assert again.hashes() == hashes
    assert not torch.equal(run(lm.model, lm, states), edited)
    assert again.hashes() == lm.hashes() != hashes


def test_what_is_put_back_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh("llama-nf4")
    name = lm.mlp_out(1)
    delta = LowRank(torch.randn(lm.shape(name)[0], 1), torch.randn(1, lm.shape(name)[1]))
    lm.set_live(name, SideCar((delta,)))
    edited = lm.live(name)
    lm.set_live(name, SideCar())
    monkeypatch.setattr(quantised_layers, "_packed", None)
    lm.set_live(name, edited)
    assert lm.live(name) is edited


def test_nothing_is_written_into_a_quantised_weight_and_a_parameter_that_is_no_matrix_is_named() -> None:
    lm = fresh("llama-nf4")
    before = lm.hashes()
    with pytest.raises(EditError, match="is quantised"), lm.swapped({lm.mlp_out(1): torch.zeros(2, 2)}):
        pass
    with pytest.raises(EditError, match=r"model\.norm\.weight is no matrix"):
        lm.shape("model.norm.weight")
    assert lm.hashes() == before


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_experts_beside_quantised_layers_are_edited_and_hashed_as_they_are(family: str) -> None:
    lm = fresh(f"{family}-nf4")
    name = lm.mlp_out(lm.n_layers - 1)
    assert lm.quantised
    before = lm.hashes()
    assert any("experts" in each for each in before)
    with lm.patched({name: [Dense(torch.ones(lm.shape(name)))]}):
        changed = lm.hashes()
    assert {each for each in before if changed[each] != before[each]} == {name}
    assert lm.hashes() == before


@pytest.mark.parametrize("family", QUANTISED)
def test_gradients_are_those_of_the_dequantised_model_also_after_it_was_used(family: str) -> None:
    lm = fresh(family)
    states = embedded(lm)
    with torch.no_grad():
        for _ in range(2):  # the first use of a layer may repack its weight
            run(lm.model, lm, states)
    gradients = []
    for model in (lm.model, dequantised(lm)):
        leaf = states.clone().requires_grad_()
        run(model, lm, leaf).log_softmax(-1)[0, -1, 5].backward()  # type: ignore[no-untyped-call]
        gradients.append(leaf.grad)
    assert float(gradients[1].norm()) > 1e-3  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", QUANTISED)
def test_a_weight_reads_as_what_the_forward_pass_multiplies_by(family: str) -> None:
    lm = make(family)
    assert lm.quantised, "the model is not quantised at all"
    states = embedded(lm)
    with torch.no_grad():
        torch.testing.assert_close(
            run(lm.model, lm, states), run(dequantised(lm), lm, states), rtol=1e-4, atol=1e-4
        )
    name = lm.mlp_out(1)
    assert tuple(lm.weight(name).shape) == lm.shape(name)


@pytest.mark.parametrize("family", QUANTISED)
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(family: str) -> None:
    lm = make(family)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 20
    module = lm.module(lm.mlp_out(0))
    with torch.no_grad():
        alone = torch.cat([module(row[None]) for row in x])
        torch.testing.assert_close(module(x), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-nf4", "llama-int8"])
def test_each_part_of_a_quantised_weight_is_in_its_hash(family: str) -> None:
    lm = fresh(family)
    name = lm.mlp_out(2)
    before = lm.hashes()
    parts = {k: t for k, t in tensors_of(lm.module(name)).items() if t.numel() > 1 and t.dtype != torch.bool}
    assert len(parts) >= 2  # the packed numbers and their scales
    for part, tensor in parts.items():
        if "quant_state" in part:  # a description made anew by each state_dict
            continue
        flat = tensor.data.view(-1)
        kept = flat[3].clone()
        flat[3] = flat[3] + 1
        after = lm.hashes()
        assert {n for n in before if before[n] != after[n]} == {name}, part
        flat[3] = kept
    assert lm.hashes() == before


def test_no_edit_touches_a_quantised_weight_and_each_is_in_the_hash() -> None:
    lm = fresh("llama-nf4")
    host = ModelHost(lm)
    stored = everything(lm)
    name = lm.mlp_out(1)
    d_out, d_in = lm.shape(name)
    generator = torch.Generator().manual_seed(1)
    low = LowRank(torch.randn(d_out, 2, generator=generator), torch.randn(2, d_in, generator=generator))
    dense = Dense(torch.randn(d_out, d_in, generator=generator))
    pristine = lm.weight(name)
    seen = {host.weights_hash}
    for deltas in ([low], [dense], [low, dense], [dense, low], [low, low]):
        with lm.patched({name: deltas}):
            torch.testing.assert_close(lm.weight(name), pristine + sum(d.dense() for d in deltas))
            x = torch.randn(3, d_in, generator=generator)
            with torch.no_grad():
                torch.testing.assert_close(lm.module(name)(x), x @ lm.weight(name).t(), rtol=1e-4, atol=1e-3)
            seen.add(host.rehash())
            assert everything(lm) == stored, "the quantised weight itself was written"
    assert len(seen) == 6, "two different side-cars have one hash"
    assert host.rehash() == host.weights_hash == host.base_hash
    assert lm.live(name) == SideCar()


def test_a_side_car_that_is_left_behind_is_seen_and_taken_off() -> None:
    lm = fresh("llama-nf4")
    host = ModelHost(lm)
    name = lm.mlp_out(0)
    d_out, d_in = lm.shape(name)
    with host.lock:
        lm.set_live(name, SideCar((Dense(torch.ones(d_out, d_in)),)))
        assert host.borrowed() == [f"what acts beside the weight {name} is another"]
    assert host.borrowed() == []
    assert host.rehash() == host.base_hash


def patch_of(method: str, lm: LM, statistics_of: StatisticsOf, *edits: Edit) -> Patch:
    editor = METHODS[method]
    quick = {n: 4 for n in ("max_steps", "steps") if n in editor.params.model_fields}
    context = EditContext(statistics_of(lm), trained=trained_for(lm))
    return editor.compute(lm, edits, editor.params(**quick), context)


@pytest.mark.parametrize("family", REST)
@pytest.mark.parametrize("method", ["rome", "memit", "ft", "lora", "grace"])
def test_methods_of_each_kind_hold_their_promises_on_other_families(
    method: str, family: str, statistics_of: StatisticsOf
) -> None:
    lm = fresh(family)
    if METHODS[method].supports(lm) is not None:
        pytest.skip(f"{method} refuses {lm.arch.family}")
    statistics_of(lm), trained_for(lm)  # made once, from random numbers
    before = everything(lm)
    first = patch_of(method, lm, statistics_of, EDIT)
    assert everything(lm) == before
    second = patch_of(method, lm, statistics_of, OTHER)
    host, never = ModelHost(lm), ModelHost(fresh(family))
    assert host.base_hash == never.base_hash
    host.set_stack([active(1, method, first), active(2, method, second)])
    host.set_stack([active(2, method, second)])
    never.set_stack([active(2, method, load(save(second)))])
    assert host.rehash() == host.weights_hash == never.rehash()
    assert answers(host.lm) == answers(never.lm)
    host.set_stack([])
    assert host.rehash() == host.base_hash
    assert everything(lm) == before


@pytest.mark.parametrize("family", ["llama-nf4", "llama-int8"])
def test_an_edit_leaves_as_a_lora_adapter_for_the_quantised_base(
    family: str, statistics_of: StatisticsOf, tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    lm = fresh(family)
    patch = patch_of("memit", lm, statistics_of, EDIT, OTHER)
    states = embedded(lm)
    with applied(lm, patch), torch.no_grad():
        wanted = run(lm.model, lm, states)
    adapter = as_adapter(lm, join_deltas([patch]), "base")
    save_file(adapter.tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter.config))
    with torch.no_grad():
        plain = run(lm.model, lm, states)
        loaded = PeftModel.from_pretrained(fresh(family).model, str(tmp_path))
        settle(loaded)  # on a CPU bitsandbytes rounds activations too, in evaluation mode
        found = run(loaded, lm, states)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


class Rounding(nn.Module):
    """Says that it is a linear layer, and is none."""

    in_features, out_features = 64, 32

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ones(32, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :32].abs().round()


def test_a_quantised_layer_that_is_not_linear_is_refused_by_its_name() -> None:
    lm = fresh("llama-nf4")
    lm.model.model.layers[1].mlp.down_proj = Rounding()
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.down_proj \(Rounding\) is off by .*unquantised"):
        LM(lm.model, lm.tokenizer, "not linear")


def test_layers_are_settled_so_that_a_first_use_repacks_nothing() -> None:
    lm = fresh("llama-nf4")
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in lm.model.modules())
    before = {name: tensors_of(module) for name, module in quantised_modules(lm.model)}
    settle(lm.model)
    run(lm.model, lm, embedded(lm))
    for name, module in quantised_modules(lm.model):
        after = tensors_of(module)
        assert before[name].keys() == after.keys()
        assert all(torch.equal(before[name][k], after[k]) for k in after)
