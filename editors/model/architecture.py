"""One row per model family: where its parts are. The only place that names a module of a family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one family are, as dotted paths.

    `layers`, `norm`, `head` and `embed` start at the model; the rest start at one layer.
    """

    family: str
    layers: str
    norm: str
    head: str
    embed: str
    attn_out: str  # what mixes tokens: the attention's output projection
    mlp: str
    mlp_in: tuple[str, ...]  # what reads the residual stream; a fused gate/up projection is one entry
    mlp_out: str  # what writes to the residual stream: its input is the key, its output the value
    mlp_adds_directly: bool = (
        True  # found when a model is loaded (editors/model/probe.py), never set in a row
    )
    value_room: float = math.inf  # how far a value may move, in units of its norm; found at loading too
    mlp_norm: str | None = None  # the norm between the MLP's output and the residual stream, if there is one
    other_mlps: tuple[
        tuple[tuple[str, ...], str], ...
    ] = ()  # (mlp_in, mlp_out) of layers that lack the first
    mixers: tuple[str, ...] = ()  # what stands in for `attn_out` in layers without attention
    residual_scale: float = 1.0  # the factor of the MLP's output in the residual stream
    embed_scale: float = 1.0  # the factor of token embeddings that are given in place of ids
    logit_scale: float = 1.0  # the factor of the head's output in the logits
    streams: int = 1  # residual streams, which stand side by side in a state (AltUp in Gemma 3n)
    streams_out: str | None = None  # projections of all streams but the first, before their mean is normed
    project_out: str | None = None  # a projection between the final norm and the head
    scales_head_input: bool = False  # the head reads states times d_model^-0.5
    encoder_layers: str | None = None  # encoder-decoder families only
    encoder_mlp_out: str | None = None

    @property
    def is_seq2seq(self) -> bool:
        return self.encoder_layers is not None

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads a model of this family."""
        return "AutoModelForSeq2SeqLM" if self.is_seq2seq else "AutoModelForCausalLM"

    @property
    def peft_task(self) -> str:
        """What PEFT calls the family's task in an adapter's config."""
        return "SEQ_2_SEQ_LM" if self.is_seq2seq else "CAUSAL_LM"

    def mixer_out(self, layer: nn.Module) -> str:
        """Path, in this layer, of the output projection of its attention or of what stands in its place."""
        return next(path for path in (self.attn_out, *self.mixers) if has_module(layer, path))

    def mlp_of(self, layer: nn.Module) -> tuple[tuple[str, ...], str]:
        """Paths, in this layer, of the MLP's input and output projections (`mlp_in`, `mlp_out`)."""
        ways = ((self.mlp_in, self.mlp_out), *self.other_mlps)
        return next((way for way in ways if has_module(layer, way[1])), ways[0])


GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def _llama_like(
    family: str, mlp_in: tuple[str, ...] = GATE_UP, inside: str = "model", **more: Any
) -> Architecture:
    """The parts of a Llama; `inside` is where the text model is, in a model that also reads images."""
    usual: dict[str, Any] = {
        "norm": f"{inside}.norm",
        "attn_out": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp_out": "mlp.down_proj",
    }
    return Architecture(
        family=family,
        layers=f"{inside}.layers",
        head="lm_head",
        embed=f"{inside}.embed_tokens",
        mlp_in=mlp_in,
        **usual | more,
    )


def t5_row(family: str, decoder_in: tuple[str, ...]) -> Architecture:
    return Architecture(
        family=family,
        layers="decoder.block",
        norm="decoder.final_layer_norm",
        head="lm_head",
        embed="shared",
        attn_out="layer.0.SelfAttention.o",
        mlp="layer.2.DenseReluDense",
        mlp_in=tuple(f"layer.2.DenseReluDense.{name}" for name in decoder_in),
        mlp_out="layer.2.DenseReluDense.wo",
        encoder_layers="encoder.block",
        encoder_mlp_out="layer.1.DenseReluDense.wo",
    )


_GPT2 = Architecture(
    family="gpt2",
    layers="transformer.h",
    norm="transformer.ln_f",
    head="lm_head",
    embed="transformer.wte",
    attn_out="attn.c_proj",
    mlp="mlp",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
)

EXPERTS_OUT = "mlp.experts.out"  # see editors/model/experts.py
_DENSE = ((GATE_UP, "mlp.down_proj"),)
_SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")


def _experts(family: str, **more: Any) -> Architecture:
    """A Llama with experts in some or all layers; the others have an MLP."""
    return _llama_like(family, mlp_in=(), mlp_out=EXPERTS_OUT, other_mlps=_DENSE, **more)


_DELTA_RULE = ("linear_attn.out_proj",)  # stands in for attention in three of four layers

_AFTER_MLP = "post_feedforward_layernorm"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "smollm3": _llama_like("smollm3"),
    "granite": _llama_like("granite"),
    "gemma": _llama_like("gemma"),
    "gemma2": _llama_like("gemma2", mlp_norm=_AFTER_MLP),
    "gemma3_text": _llama_like("gemma3", mlp_norm=_AFTER_MLP),
    "gemma3": _llama_like("gemma3", inside="model.language_model", mlp_norm=_AFTER_MLP),
    # after the norm a layer may read its own embedding of the token, and scales all: no norm alone
    "gemma4_text": _llama_like("gemma4"),
    "gemma4": _llama_like("gemma4", inside="model.language_model"),
    "gemma3n_text": _llama_like("gemma3n", streams_out="model.altup_unembed_projections"),
    "olmo": _llama_like("olmo"),
    "olmo2": _llama_like("olmo2", mlp_norm=_AFTER_MLP),
    "olmo3": _llama_like("olmo3", mlp_norm=_AFTER_MLP),
    "ministral": _llama_like("ministral"),
    "ministral3": _llama_like("ministral3"),
    "mistral3": _llama_like("mistral3", inside="model.language_model"),
    "cohere": _llama_like("cohere"),
    "cohere2": _llama_like("cohere2"),
    "seed_oss": _llama_like("seed_oss"),
    "hunyuan_v1_dense": _llama_like("hunyuan"),
    "stablelm": _llama_like("stablelm"),
    "helium": _llama_like("helium"),
    "glm": _llama_like("glm", mlp_in=("mlp.gate_up_proj",)),
    "glm4": _llama_like("glm4", mlp_in=("mlp.gate_up_proj",), mlp_norm="post_mlp_layernorm"),
    "exaone4": _llama_like("exaone4", mlp_norm=_AFTER_MLP),
    "nemotron": _llama_like("nemotron", mlp_in=("mlp.up_proj",)),
    "arcee": _llama_like("arcee", mlp_in=("mlp.up_proj",)),
    "apertus": _llama_like("apertus", mlp_in=("mlp.up_proj",)),
    "starcoder2": _llama_like("starcoder2", mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
    "phi": _llama_like(
        "phi",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
        attn_out="self_attn.dense",
        norm="model.final_layernorm",
    ),
    "phi3": _llama_like("phi3", mlp_in=("mlp.gate_up_proj",)),
    "qwen2_moe": _experts("qwen2_moe"),
    "qwen3_moe": _experts("qwen3_moe"),
    "mixtral": _experts("mixtral"),
    "olmoe": _experts("olmoe"),
    "gpt_oss": _experts("gpt_oss"),
    "deepseek_v2": _llama_like(
        "deepseek_v2", mlp_in=_SHARED, mlp_out="mlp.shared_experts.down_proj", other_mlps=_DENSE
    ),
    "lfm2": _llama_like(
        "lfm2",
        norm="model.embedding_norm",
        attn_out="self_attn.out_proj",
        mixers=("conv.out_proj",),
        mlp="feed_forward",
        mlp_in=("feed_forward.w1", "feed_forward.w3"),
        mlp_out="feed_forward.w2",
    ),
    "qwen3_next": _experts("qwen3_next", mixers=_DELTA_RULE),
    "qwen3_5_text": _llama_like("qwen3_5", mixers=_DELTA_RULE),
    "qwen3_5": _llama_like("qwen3_5", inside="model.language_model", mixers=_DELTA_RULE),
    "qwen3_5_moe_text": _experts("qwen3_5_moe", mixers=_DELTA_RULE),
    "qwen3_5_moe": _experts("qwen3_5_moe", inside="model.language_model", mixers=_DELTA_RULE),
    "falcon_h1": _llama_like(
        "falcon_h1",
        norm="model.final_layernorm",
        mlp="feed_forward",
        mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
        mlp_out="feed_forward.down_proj",
    ),
    "granitemoehybrid": _llama_like(
        "granitemoehybrid",
        mixers=("mamba.out_proj",),
        mlp="shared_mlp",
        mlp_in=("shared_mlp.input_linear",),
        mlp_out="shared_mlp.output_linear",
    ),
    "gpt2": _GPT2,
    "gptj": Architecture(
        family="gptj",
        layers="transformer.h",
        norm="transformer.ln_f",
        head="lm_head",
        embed="transformer.wte",
        attn_out="attn.out_proj",
        mlp="mlp",
        mlp_in=("mlp.fc_in",),
        mlp_out="mlp.fc_out",
    ),
    "gpt_neox": Architecture(
        family="gpt_neox",
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        head="lm_head",
        embed="gpt_neox.embed_in",
        attn_out="attention.dense",
        mlp="mlp",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
    ),
    "opt": Architecture(
        family="opt",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        head="lm_head",
        embed="model.decoder.embed_tokens",
        attn_out="self_attn.out_proj",
        mlp="fc2",
        mlp_in=("fc1",),
        mlp_out="fc2",
    ),
    "t5": t5_row("t5", ("wi",)),
}


def resolve(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; raises AttributeError when there is none."""
    return reduce(lambda module, name: getattr(module, name), path.split("."), root)


def has_module(root: nn.Module, path: str) -> bool:
    """Whether there is a module at a dotted path."""
    try:
        return resolve(root, path) is not None
    except AttributeError:
        return False
