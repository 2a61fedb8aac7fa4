"""One row per model family: where its parts are. The only place that names a module of a family."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from editors.errors import Unsupported
from editors.model.quantised import is_plain, quantisation, refuse_non_linear


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
    mlp_adds_directly: bool = True  # found when a model is loaded (editors/model/probe.py), never written
    value_room: float = math.inf  # how far a value may move, in units of its norm: found too
    mlp_norm: str | None = None  # stands between the MLP's output and the residual stream, where there is one
    other_mlps: tuple[
        tuple[tuple[str, ...], str], ...
    ] = ()  # (mlp_in, mlp_out) of layers that lack the first
    mixers: tuple[str, ...] = ()  # what stands in for `attn_out` in layers without attention
    residual_scale: float = 1.0  # what the residual stream gets is the MLP's output times this
    logit_scale: float = 1.0  # logits are the head's output times this
    project_out: str | None = None  # a projection between the final norm and the head
    scales_head_input: bool = False  # the head reads states times d_model^-0.5
    encoder_layers: str | None = None  # encoder-decoder families only
    encoder_mlp_out: str | None = None

    @property
    def is_seq2seq(self) -> bool:
        return self.encoder_layers is not None

    def mixer_out(self, layer: nn.Module) -> str:
        """Path, in this layer, of the output projection of its attention or of what stands in its place."""
        return next(path for path in (self.attn_out, *self.mixers) if _has(layer, path))

    def mlp_of(self, layer: nn.Module) -> tuple[tuple[str, ...], str]:
        """Paths, in this layer, of what its MLP reads by and what it writes by (`mlp_in`, `mlp_out`)."""
        ways = ((self.mlp_in, self.mlp_out), *self.other_mlps)
        return next((way for way in ways if _has(layer, way[1])), ways[0])


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


def _t5(family: str, decoder_in: tuple[str, ...]) -> Architecture:
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


def _experts(family: str) -> Architecture:
    """A Llama with experts in some or all layers; the others have an MLP."""
    return _llama_like(family, mlp_in=(), mlp_out=EXPERTS_OUT, other_mlps=_DENSE)


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
    "t5": _t5("t5", ("wi",)),
}


def resolve(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; raises AttributeError when there is none."""
    return reduce(lambda module, name: getattr(module, name), path.split("."), root)


def _has(root: nn.Module, path: str) -> bool:
    try:
        return resolve(root, path) is not None
    except AttributeError:
        return False


def architecture_of(model: nn.Module) -> Architecture:
    """The row for a loaded model. Raises Unsupported, naming the family, when there is none or it cannot be edited.

    How the MLP's output meets the residual stream is not written in the table: see `editors.model.probe`.
    """
    config: Any = model.config
    kind = config.model_type
    text = config.get_text_config()
    row = ARCHITECTURES.get(kind)
    if _is_moe(text) and row is None:
        known = sorted(name for name, other in ARCHITECTURES.items() if other.other_mlps)
        raise Unsupported(
            f"{kind} has mixture-of-experts layers of a kind that is not known; known are {', '.join(known)}. Load one "
            "of those, or a dense model (Llama, Mistral, Qwen2/3, Gemma, Phi-3, GPT-2 ...)."
        )
    if row is None:
        raise Unsupported(
            f"the model family {kind!r} is not known; known are {', '.join(sorted(ARCHITECTURES))}. "
            f"A new family is one row in editors/model/architecture.py.{_resembles(model)}"
        )
    row = _by_config(row, model, text)
    for index in range(len(list(resolve(model, row.layers).children()))):
        _refuse_quantised(model, row, index)
    return row


def _by_config(row: Architecture, model: nn.Module, config: Any) -> Architecture:
    """What depends on the config and not on the family alone."""
    kind = config.model_type
    if kind == "opt" and model.get_submodule("model.decoder").project_out is not None:
        row = replace(row, project_out="model.decoder.project_out")
    if kind == "t5" and config.is_gated_act:
        row = _t5("t5", ("wi_0", "wi_1"))
    if kind == "t5" and config.tie_word_embeddings:
        row = replace(row, scales_head_input=True)
    if kind.startswith("granite"):
        row = replace(row, residual_scale=config.residual_multiplier, logit_scale=1 / config.logits_scaling)
    if kind.startswith("cohere"):
        row = replace(row, logit_scale=config.logit_scale)
    if kind == "falcon_h1":
        row = replace(row, residual_scale=config.mlp_multipliers[1], logit_scale=config.lm_head_multiplier)
    return row


def _resembles(model: nn.Module) -> str:
    """A sentence on the known family whose parts this model has too; empty where there is none."""
    for kind, row in ARCHITECTURES.items():
        if not all(_has(model, path) for path in (row.layers, row.norm, row.head, row.embed)):
            continue
        layers = list(resolve(model, row.layers).children())
        if layers and all(
            _has(layer, path) for layer in layers for path in (row.attn_out, *row.mlp_in, row.mlp_out)
        ):
            parts = ", ".join((row.attn_out, *row.mlp_in, row.mlp_out))
            return (
                f" This one looks like {kind}: its layers have {parts}. Start with a copy of that row: "
                f"ARCHITECTURES[{model.config.model_type!r}] = replace(ARCHITECTURES[{kind!r}], "  # type: ignore[union-attr]
                f"family={model.config.model_type!r}); loading checks it by numbers."  # type: ignore[union-attr]
            )
    return ""


def _is_moe(config: Any) -> bool:
    counts = (
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    return any(isinstance(n, int) and n > 1 for n in counts)


def _refuse_quantised(model: nn.Module, row: Architecture, index: int) -> None:
    layer = resolve(model, f"{row.layers}.{index}")
    path = row.mlp_of(layer)[1]
    if path == EXPERTS_OUT:
        return  # looked at where the experts are joined
    try:
        first = resolve(layer, path)
    except AttributeError:
        raise Unsupported(
            f"layer {index} of this {row.family} model has no {path}: not the dense {row.family} architecture "
            "(mixture of experts?). Load a dense model."
        ) from None
    if is_plain(first):
        return
    if quantisation(model) is None or not hasattr(first, "in_features"):
        raise Unsupported(
            f"the layers of this model are quantised ({type(first).__name__}) in a way that is not known; their "
            "weights cannot take an exact delta. Load the model unquantised, in float32, bfloat16 or float16, or with "
            "--quantize nf4 or int8."
        )
    refuse_non_linear(f"{row.layers}.{index}.{path}", first, model.dtype)  # type: ignore[arg-type]
