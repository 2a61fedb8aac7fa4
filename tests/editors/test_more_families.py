"""Families whose rows are near those of the families that every test runs on: what could differ is tested on each.

A row is checked by numbers when a model loads; here are also wrong rows, which must be refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from editors import METHODS
from editors.closed_form.defaults import default_layer
from editors.closed_form.varied_rows import VariedRows
from editors.errors import InvalidEdit, Unsupported
from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams, causal_trace
from editors.locate.lens import direct_attribution, logit_lens
from editors.locate.traced_prompt import embed, run, tokenize_fact
from editors.method import EditContext
from editors.model.architecture import ARCHITECTURES
from editors.model.lm import LM
from editors.model.probe import probed
from editors.model.recognise import architecture_of
from editors.patch import save
from editors.patch_kinds import load
from server.models import loading
from server.settings import Settings
from server.transaction.host import ModelHost
from tests.editors import test_rome
from tests.editors.conftest import StatisticsOf
from tests.editors.test_contract import EDITS, active, everything, params_of
from tests.editors.test_steering import dose_of, logits, same, steered, vector_of
from tests.editors.test_varied_rows import check, rows_of
from tests.families import HIDDEN, LAYERS, MORE, RECURRENT, fresh, make, parts, save_to

# What differs between families is read by every method through the same row; each kind of patch is tried on each,
# all methods on one with a norm after the MLP, one with scaled residuals and one with another head.
KINDS = ("rome", "memit", "lora", "grace")
EVERY = ("gemma3_wrapper", "granite", "cohere")
FEW: dict[str, tuple[str, ...]] = dict.fromkeys(RECURRENT, ("rome", "lora", "grace"))
FEW |= {"qwen3_5_wrapper": ("rome",), "gemma4_wrapper": ("rome", "ft"), "gemma4_experts": ("rome",)}
FEW |= {"gemma3n": ("rome", "lora", "grace", "ultraedit")}
NO_SUM = [family for family in MORE if family.startswith(("gemma3n", "gemma4"))]
"""Families whose layers scale the residual stream, so that a logit is not a sum of what they write."""
TRIED = [
    (f, m)
    for f in MORE
    for m in (METHODS if f in EVERY else FEW.get(f, KINDS))
    if METHODS[m].training is None
]


def said(lm: LM) -> list[str]:
    return [g.text for g in lm.generate([lm.prompt(e.text) for e in EDITS], 6)]


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("family", MORE)
def test_a_search_for_a_value_sees_the_logits_of_a_full_forward(family: str, layer: int) -> None:
    lm = make(family)
    rows = rows_of(lm)
    above = VariedRows(lm, layer, rows)
    delta = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(0)).to(lm.device)
    with torch.no_grad():
        check(lm, layer, rows, above, torch.zeros_like(delta), 2e-4)
        check(lm, layer, rows, above, delta, 2e-4)


@pytest.mark.parametrize(("family", "method"), TRIED)
def test_an_edit_changes_what_it_says_and_nothing_stays_after_it(
    family: str, method: str, statistics_of: StatisticsOf
) -> None:
    """Computing changes nothing, a saved patch replays to the same hash, and taken off nothing is left."""
    lm, same_lm = fresh(family), fresh(family)
    context = EditContext(statistics_of(lm))
    before = everything(lm)
    patch = METHODS[method].compute(lm, EDITS[:2], params_of(METHODS[method]), context)
    assert everything(lm) == before
    host, other = ModelHost(lm), ModelHost(same_lm)
    host.set_stack([active(1, method, patch, 2)])
    assert host.rehash() != host.base_hash or patch.kind != "weight"
    other.set_stack([active(1, method, load(save(patch)), 2)])
    assert host.rehash() == other.rehash()
    assert said(host.lm) == said(other.lm)
    host.set_stack([])
    assert host.rehash() == host.base_hash
    assert everything(lm) == before


@pytest.mark.parametrize("family", [f for f in MORE if f != "gemma4_wrapper"])  # its layer 1 takes no facts
def test_the_edited_weight_maps_the_key_to_the_value(family: str, statistics_of: StatisticsOf) -> None:
    test_rome.test_the_edited_weight_maps_the_key_to_the_value(family, "full", statistics_of)


@pytest.mark.parametrize("family", [f for f in MORE if f not in NO_SUM])
def test_the_logit_is_the_sum_of_what_layers_write(family: str) -> None:
    lm = make(family)
    traced = tokenize_fact(lm, "The capital of France is", "France", "Berlin")
    attention, mlp, embedding, constant = direct_attribution(lm, traced)
    with torch.no_grad():
        states = run(lm, traced, embed(lm, traced), parts=False).hidden[-1][0, traced.last]
    own = lm.head(states).float()
    expected = own[traced.target[0]] - own.mean()
    total = attention.sum() + mlp.sum() + embedding + constant
    torch.testing.assert_close(total, expected.cpu(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", NO_SUM)
def test_a_logit_that_is_no_sum_is_not_shared_out(family: str) -> None:
    with pytest.raises(Unsupported, match="logits are not a sum of parts"):
        direct_attribution(make(family), tokenize_fact(make(family), "The capital of France is", "France"))


def test_a_layer_whose_writing_no_later_token_reads_takes_no_fact(statistics_of: StatisticsOf) -> None:
    """Layers 2 and 3 take their keys from 0 and 1, so that what layer 1 writes at the subject stays there."""
    lm = make("gemma4_wrapper")
    context = EditContext(statistics_of(lm))
    for method, params in (("rome", {"layer": 1}), ("memit", {"layers": [0, 1]}), ("wise", {"layers": [2]})):
        editor = METHODS[method]
        with pytest.raises(InvalidEdit, match=r"layer [12] cannot carry a fact.* 0 to 0, or use method ft"):
            editor.compute(lm, EDITS[:1], editor.params(**params), context)
    assert default_layer(lm) == 0
    above = VariedRows(lm, 1, rows_of(lm)[1:2])
    moved = above(torch.randn(1, HIDDEN)) - above(torch.zeros(1, HIDDEN))
    assert moved[:, 0].any()
    assert not moved[:, 1:].any()


def test_several_residual_streams_are_one_state_whose_norm_is_not_held(statistics_of: StatisticsOf) -> None:
    lm = make("gemma3n")
    assert lm.d_model == 4 * HIDDEN
    ids = torch.tensor([lm.encode(lm.prompt("The capital of France is"))[0]], device=lm.device)
    with torch.no_grad():
        states = lm.hidden(ids, torch.ones_like(ids))
        assert states.shape == (1, ids.shape[1], 4 * HIDDEN)
        torch.testing.assert_close(lm.head(states), lm.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    editor, context = METHODS["rome"], EditContext(statistics_of(lm))
    with pytest.raises(InvalidEdit, match="has 4; leave anchor out"):
        editor.compute(lm, EDITS[:1], editor.params(anchor=True), context)
    editor.compute(lm, EDITS[:1], editor.params(max_steps=1), context)


def test_layers_that_read_more_than_states_are_not_traced_one_by_one() -> None:
    lm = make("gemma4")
    with pytest.raises(Unsupported, match="use method attribution_patching or logit_lens"):
        causal_trace(lm, "The capital of France is", "France", None, TraceParams(samples=1), lambda *_: None)
    found = logit_lens(lm, "The capital of France is", "France", None, lambda *_: None)
    assert found.maps["lens"].shape[1] == LAYERS


@pytest.mark.parametrize("family", MORE)
def test_tracing_and_steering_work_and_leave_the_model_as_it_was(family: str) -> None:
    lm = make(family)
    before, state = logits(lm), everything(lm)
    attribution_patching(
        lm, "The capital of France is", "France", None, TraceParams(samples=2), lambda *_: None
    )
    with steered(lm, dose_of("mood", vector_of(lm), 0.5)):
        assert not same(logits(lm), before)
    assert same(logits(lm), before)
    assert everything(lm) == state


@pytest.mark.parametrize("family", ["gemma3_wrapper", "mistral3", "granite", "olmo2"])
def test_a_saved_model_of_the_family_loads_from_its_folder(family: str, tmp_path: Any) -> None:
    folder = save_to(family, tmp_path / "model")
    lm = loading.load(Settings(model=str(folder), home=tmp_path, device="cpu"), lambda *_: None)
    assert lm.n_layers == LAYERS
    assert same(logits(lm), logits(make(family)))


@pytest.mark.parametrize(
    ("family", "wrong", "refusal"),
    [
        ("granite", {"residual_scale": 1.0}, None),
        ("granite", {"residual_scale": 0.3}, "not reach the residual stream times 0.3"),
        ("llama", {"mlp_norm": "post_attention_layernorm"}, "does not stand between"),
        ("llama", {"mlp_out": "mlp.gate_proj"}, "reach the residual stream|does not lead to"),
        ("llama", {"mlp_in": ("mlp.gate_proj", "self_attn.o_proj", "mlp.up")}, "has no mlp.up"),
        ("llama", {"mlp_in": ("mlp.down_proj",)}, "does not lead to mlp.down_proj"),
        ("olmo2", {"mlp_norm": "post_attention_layernorm"}, "not added to the residual stream as it is"),
    ],
)
def test_a_wrong_row_is_refused_when_a_model_loads(
    family: str, wrong: dict[str, Any], refusal: str | None
) -> None:
    lm = make(family)
    row = replace(lm.arch, mlp_adds_directly=True, **wrong)
    if refusal is None:  # a scale that the row does not name: found, as a stream that gets something else
        assert not probed(lm.model, row).mlp_adds_directly
        return
    with pytest.raises(Unsupported, match=refusal):
        probed(lm.model, row)


@pytest.mark.parametrize("name", ["norm", "logit_scale"])
def test_a_row_whose_head_gives_other_logits_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"norm": "model.layers.0.input_layernorm", "logit_scale": 3.0}
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], **{name: wrong[name]}))
    with pytest.raises(Unsupported, match="do not turn the last layer's states into the model's logits"):
        LM(*parts("llama"), "tiny")


def test_a_family_without_a_row_is_offered_the_row_it_resembles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARCHITECTURES, "smollm3")
    with pytest.raises(Unsupported, match=r"'smollm3' is not known; .*looks like a? ?llama.*mlp\.down_proj"):
        LM(*parts("smollm3"), "tiny")
    row = replace(ARCHITECTURES["llama"], family="smollm3")  # what the message says to write
    monkeypatch.setitem(ARCHITECTURES, "smollm3", row)
    assert LM(*parts("smollm3"), "tiny").arch.mlp_adds_directly


def test_a_family_that_resembles_none_is_told_no_row() -> None:
    config = transformers.CTRLConfig(
        vocab_size=300, n_embd=HIDDEN, dff=64, n_layer=2, n_head=4, n_positions=64
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(Unsupported, match="'ctrl' is not known") as raised:
        architecture_of(model)
    assert "looks like" not in str(raised.value)


def test_the_probe_leaves_a_model_and_the_random_numbers_as_they_were() -> None:
    model, words = parts("olmo2")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    LM(model, words, "tiny")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
