"""The table of families: each row finds its parts, and what cannot be edited is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from editors.errors import InvalidEdit, Unsupported
from editors.model.activations import record
from editors.model.architecture import ARCHITECTURES, resolve
from editors.model.lm import LM
from editors.model.recognise import architecture_of
from tests.families import (
    CONTEXT,
    DECODERS,
    FAMILIES,
    HIDDEN,
    INNER,
    LAYERS,
    MORE,
    ROUTED,
    fresh,
    make,
    parts,
)

GPT2_INNER = 4 * HIDDEN


def inner(family: str) -> int:
    return GPT2_INNER if family in ("gpt2",) else INNER


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_a_family_is_where_its_row_says(family: str) -> None:
    lm = make(family)
    arch = lm.arch
    assert lm.n_layers == LAYERS
    for path in (arch.norm, arch.head, arch.embed):
        assert isinstance(resolve(lm.model, path), nn.Module)
    for layer in lm.layers:
        for path in (arch.attn_out, arch.mlp, arch.mlp_out, *arch.mlp_in):
            assert isinstance(resolve(layer, path), nn.Module)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_reads_and_writes_the_residual_stream(family: str) -> None:
    lm = make(family)
    for i, layer in enumerate(lm.layers):
        assert lm.weight(lm.mlp_out(i)).shape == (HIDDEN, inner(family))
        projections: list[Any] = [resolve(layer, path) for path in lm.arch.mlp_in]
        widths = [p.weight.numel() // HIDDEN for p in projections]
        assert sum(widths) in (inner(family), 2 * inner(family))  # plain, or gate and up


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_has_its_own_rows(family: str) -> None:
    lm = make(family)
    assert lm.is_seq2seq == (family == "t5")
    if lm.is_seq2seq:
        assert lm.arch.encoder_layers
        assert lm.arch.encoder_mlp_out
        for layer in resolve(lm.model, lm.arch.encoder_layers).children():
            assert isinstance(resolve(layer, lm.arch.encoder_mlp_out), nn.Module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_a_view_the_model_runs_on(family: str) -> None:
    """(d_out, d_in), sharing memory, and in the orientation in which output = weight @ input + bias."""
    lm = fresh(family)
    name = lm.mlp_out(1)
    weight = lm.weight(name)
    assert weight.data_ptr() == lm.model.get_parameter(name).data_ptr()
    module: Any = lm.module(name)
    k = torch.randn(3, inner(family), device=lm.device)
    bias = module.bias if getattr(module, "bias", None) is not None else torch.zeros(HIDDEN, device=lm.device)
    torch.testing.assert_close(module(k), k @ weight.t() + bias)
    weight[0, 0] += 1
    torch.testing.assert_close(module(k)[:, 0], (k @ weight.t() + bias)[:, 0])


@pytest.mark.parametrize("family", DECODERS)
def test_an_mlp_adds_to_the_residual_stream_where_its_row_says_so(family: str) -> None:
    lm = make(family)
    ids = torch.tensor([[5, 17, 40]], device=lm.device)
    layer = lm.layers[1]
    with record({"mlp": lm.module(lm.mlp_out(1)), "layer": layer}) as plain:
        lm.base_model(input_ids=ids)
    bump = torch.randn(3, HIDDEN, device=lm.device)
    handle = lm.module(lm.mlp_out(1)).register_forward_hook(lambda m, a, out: out + bump.view_as(out))
    with handle, record({"layer": layer}) as moved:
        lm.base_model(input_ids=ids)
    adds = torch.allclose(moved["layer"] - plain["layer"], bump[None], atol=1e-5)
    assert adds == lm.arch.mlp_adds_directly


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_not_there_is_refused_with_the_ones_that_are(family: str) -> None:
    for layer in (-1, LAYERS):
        with pytest.raises(InvalidEdit, match=f"layer {layer} does not exist.*0 to {LAYERS - 1}"):
            make(family).mlp_out(layer)


def test_every_row_of_the_table_is_tested_on_a_model() -> None:
    kinds = {make(family).model.config.model_type for family in (*FAMILIES, *MORE, *ROUTED)}
    assert kinds == set(ARCHITECTURES)


def _small(name: str, **fields: Any) -> Any:
    config = getattr(transformers, name)(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        **fields,
    )
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(config)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("PhimoeConfig", {"num_local_experts": 2}),
        ("Ernie4_5_MoeConfig", {"moe_num_experts": 2, "num_experts": 2, "moe_intermediate_size": 16}),
    ],
)
def test_a_mixture_of_experts_is_refused_with_what_would_work(name: str, fields: dict[str, Any]) -> None:
    model = _small(name, **fields)
    kind = model.config.model_type
    with pytest.raises(Unsupported, match=rf"{kind}.*experts.*known are .*mixtral.*or a dense model"):
        architecture_of(model)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.CTRLConfig(vocab_size=300, n_embd=HIDDEN, dff=INNER, n_layer=2, n_head=4)
    )
    with pytest.raises(Unsupported, match=r"'ctrl' is not known; known are .*gpt2.*llama"):
        architecture_of(model)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed into bytes, as quantisers leave it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


class FancyLinear(nn.Linear):
    """A subclass may compute something else than its weight says."""


def _as_int8(linear: nn.Linear) -> nn.Module:
    return PackedLinear(linear)


def _as_fancy(linear: nn.Linear) -> nn.Module:
    return FancyLinear(linear.in_features, linear.out_features)


def _as_float8(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return linear


@pytest.mark.parametrize("replace", [_as_int8, _as_fancy, _as_float8])
def test_quantised_layers_are_refused(replace: Any) -> None:
    model: Any = parts("llama")[0]
    for layer in model.model.layers:
        layer.mlp.down_proj = replace(layer.mlp.down_proj)
    with pytest.raises(Unsupported, match=r"quantised.*[Ll]oad the model unquantised"):
        architecture_of(model)


def test_one_quantised_layer_among_plain_ones_is_refused_too() -> None:
    model: Any = parts("llama")[0]
    model.model.layers[2].mlp.down_proj = _as_int8(model.model.layers[2].mlp.down_proj)
    with pytest.raises(Unsupported, match="quantised"):
        architecture_of(model)


def test_a_slow_tokenizer_is_refused() -> None:
    model, words = parts("gpt2")

    class Slow:
        is_fast = False
        pad_token_id = words.pad_token_id

    with pytest.raises(Unsupported, match="no offsets"):
        LM(model, Slow(), "slow")  # type: ignore[arg-type]


def test_a_model_in_training_mode_with_gradients_is_frozen_on_arrival() -> None:
    model, words = parts("llama")
    lm = LM(model.train().requires_grad_(True), words, "busy")
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_a_gated_t5_keeps_its_row_with_both_inputs() -> None:
    config: Any = transformers.T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model: Any = transformers.T5ForConditionalGeneration
    arch = architecture_of(model(config))
    assert arch.mlp_in == ("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1")
