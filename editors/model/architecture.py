"""One row per model family: where its parts are. The only place that names a module of a family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editors.errors import Unsupported


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
    attn_out: str
    mlp: str
    mlp_in: tuple[str, ...]  # what reads the residual stream; a fused gate/up projection is one entry
    mlp_out: str  # what writes to the residual stream: its input is the key, its output the value
    mlp_adds_directly: bool = True  # False where a norm stands between the MLP's output and the residual
    mlp_norm: str | None = None  # that norm, where the residual is a plain sum all the same
    project_out: str | None = None  # a projection between the final norm and the head
    scales_head_input: bool = False  # the head reads states times d_model^-0.5
    encoder_layers: str | None = None  # encoder-decoder families only
    encoder_mlp_out: str | None = None

    @property
    def is_seq2seq(self) -> bool:
        return self.encoder_layers is not None


def _llama_like(
    family: str, mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj"), **more: Any
) -> Architecture:
    return Architecture(
        family=family,
        layers="model.layers",
        norm="model.norm",
        head="lm_head",
        embed="model.embed_tokens",
        attn_out="self_attn.o_proj",
        mlp="mlp",
        mlp_in=mlp_in,
        mlp_out="mlp.down_proj",
        **more,
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

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral"),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3"),
    "gemma2": _llama_like("gemma2", mlp_adds_directly=False, mlp_norm="post_feedforward_layernorm"),
    "gemma3_text": _llama_like("gemma3", mlp_adds_directly=False, mlp_norm="post_feedforward_layernorm"),
    "phi3": _llama_like("phi3", mlp_in=("mlp.gate_up_proj",)),
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


def architecture_of(model: nn.Module) -> Architecture:
    """The row for a loaded model. Raises Unsupported, naming the family, when there is none or it cannot be edited."""
    config: Any = model.config
    kind = config.model_type
    row = ARCHITECTURES.get(kind)
    if _is_moe(config):
        raise Unsupported(
            f"{kind} with mixture-of-experts layers cannot be edited: a fact's key goes to experts that the router "
            "chooses. Load a dense model (Llama, Mistral, Qwen2/3, Gemma, Phi-3, GPT-2 ...)."
        )
    if row is None:
        raise Unsupported(
            f"the model family {kind!r} is not known; known are {', '.join(sorted(ARCHITECTURES))}. "
            "A new family is one row in editors/model/architecture.py."
        )
    if kind == "opt" and not config.do_layer_norm_before:
        row = _replace(row, mlp_adds_directly=False)
    if kind == "opt" and model.get_submodule("model.decoder").project_out is not None:
        row = _replace(row, project_out="model.decoder.project_out")
    if kind == "t5" and config.is_gated_act:
        row = _t5("t5", ("wi_0", "wi_1"))
    if kind == "t5" and config.tie_word_embeddings:
        row = _replace(row, scales_head_input=True)
    for index in range(len(list(resolve(model, row.layers).children()))):
        _refuse_quantised(model, row, index)
    return row


def _replace(row: Architecture, **changes: Any) -> Architecture:
    return Architecture(**{**row.__dict__, **changes})


def _is_moe(config: Any) -> bool:
    counts = (
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    return any(isinstance(n, int) and n > 1 for n in counts)


def _refuse_quantised(model: nn.Module, row: Architecture, index: int) -> None:
    layers = resolve(model, row.layers)
    try:
        first = resolve(layers, f"{index}.{row.mlp_out}")
    except AttributeError:
        raise Unsupported(
            f"layer {index} of this {row.family} model has no {row.mlp_out}: not the dense {row.family} architecture "
            "(mixture of experts?). Load a dense model."
        ) from None
    weight = getattr(first, "weight", None)
    exact = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize >= 2
    if type(first) not in (nn.Linear, Conv1D) or not exact:
        raise Unsupported(
            f"the layers of this model are quantised ({type(first).__name__}); their weights cannot take an exact "
            "delta. Load the model unquantised, in float32, bfloat16 or float16."
        )
