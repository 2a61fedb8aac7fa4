"""Tiny random models of every supported family, made from configs: seeded, whole in milliseconds.

Weights are larger than at a usual initialisation, so that logits differ clearly, and norms and
biases are not ones and zeros, so that a test notices when one of them is left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from editors.model.lm import LM
from tests import device
from tests.tiny_tokenizers import tokenizer

LAYERS = 4
HIDDEN = 32
INNER = 64  # of the MLP
HEADS = 4
KV_HEADS = 2
CONTEXT = 512
WINDOW = 256  # of the sliding-window families: wider than any prompt of the tests
SPREAD = 0.15  # standard deviation of the weights


@dataclass(frozen=True)
class Family:
    """How to make a tiny model: its config class and fields, and the kind of its tokenizer."""

    config: str
    tokenizer: str
    fields: dict[str, Any]


_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
}
_GEMMA: dict[str, Any] = _LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_GPT: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

_FAMILIES = {
    "llama": Family("LlamaConfig", "llama3", _LLAMA_LIKE),
    "mistral": Family("MistralConfig", "llama2", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config", "qwen", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", "qwen", _LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": Family("Gemma2Config", "gemma", _GEMMA),
    "gemma3": Family("Gemma3TextConfig", "gemma", _GEMMA),
    "phi3": Family("Phi3Config", "phi3", _LLAMA_LIKE),
    "gpt2": Family("GPT2Config", "gpt2", _GPT | _NO_DROPOUT),
    "gptj": Family("GPTJConfig", "gpt2", _GPT | _NO_DROPOUT | {"rotary_dim": 4, "n_inner": INNER}),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "neox",
        {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"},
    ),
    "opt": Family(
        "OPTConfig",
        "opt",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": HIDDEN,
            "dropout": 0.0,
        },
    ),
    "t5": Family(
        "T5Config",
        "t5",
        {
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}
ENCODER_DECODER = ("t5",)
FAMILIES = tuple(_FAMILIES)

_HEAD_8: dict[str, Any] = _LLAMA_LIKE | {"head_dim": 8}
_HYBRID = {kind: [kind, "full_attention"] * (LAYERS // 2) for kind in ("conv", "linear_attention")}
_DELTA_RULE: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
_GEMMA4: dict[str, Any] = _HEAD_8 | {
    "sliding_window": WINDOW,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
_OWN_EMBEDDINGS: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024}
_GEMMA3N: dict[str, Any] = _HEAD_8 | {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 1024,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
_BARE = {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}
_MORE = {
    "smollm3": Family("SmolLM3Config", "llama3", _LLAMA_LIKE),
    "granite": Family(
        "GraniteConfig", "gpt2", _LLAMA_LIKE | {"residual_multiplier": 0.5, "logits_scaling": 4.0}
    ),
    "gemma": Family("GemmaConfig", "gemma", _HEAD_8),
    "gemma3_wrapper": Family("Gemma3Config", "gemma", _GEMMA | {"layer_types": ["full_attention"] * LAYERS}),
    "olmo": Family("OlmoConfig", "neox", _LLAMA_LIKE),
    "olmo2": Family("Olmo2Config", "neox", _LLAMA_LIKE),
    "olmo3": Family("Olmo3Config", "neox", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "ministral": Family("MinistralConfig", "llama2", _HEAD_8 | {"sliding_window": WINDOW}),
    "ministral3": Family("Ministral3Config", "llama2", _HEAD_8),
    "mistral3": Family("Mistral3Config", "llama2", _HEAD_8),
    "cohere": Family("CohereConfig", "llama2", _LLAMA_LIKE | {"logit_scale": 0.25}),
    "cohere2": Family("Cohere2Config", "llama2", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "seed_oss": Family("SeedOssConfig", "qwen", _HEAD_8),
    "hunyuan": Family("HunYuanDenseV1Config", "llama2", _HEAD_8),
    "stablelm": Family("StableLmConfig", "neox", _LLAMA_LIKE),
    "stablelm_parallel": Family("StableLmConfig", "neox", _LLAMA_LIKE | {"use_parallel_residual": True}),
    "helium": Family("HeliumConfig", "llama2", _HEAD_8),
    "glm": Family("GlmConfig", "qwen", _HEAD_8),
    "glm4": Family("Glm4Config", "qwen", _HEAD_8),
    "exaone4": Family("Exaone4Config", "gpt2", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "nemotron": Family("NemotronConfig", "llama2", _LLAMA_LIKE),
    "arcee": Family("ArceeConfig", "llama3", _LLAMA_LIKE),
    "apertus": Family("ApertusConfig", "llama2", _LLAMA_LIKE),
    "starcoder2": Family("Starcoder2Config", "gpt2", _LLAMA_LIKE),
    "phi": Family("PhiConfig", "gpt2", _LLAMA_LIKE),
    "gemma4": Family("Gemma4TextConfig", "gemma", _GEMMA4 | _OWN_EMBEDDINGS | {"num_kv_shared_layers": 1}),
    "gemma4_wrapper": Family(
        "Gemma4Config",
        "gemma",
        _GEMMA4 | _OWN_EMBEDDINGS | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    ),
    "gemma3n": Family("Gemma3nTextConfig", "gemma", _GEMMA3N | {"num_kv_shared_layers": 1}),
    "gemma4_experts": Family(
        "Gemma4TextConfig",
        "gemma",
        _GEMMA4
        | {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "lfm2": Family(
        "Lfm2Config",
        "llama3",
        _LLAMA_LIKE | {"layer_types": _HYBRID["conv"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_5": Family(
        "Qwen3_5TextConfig", "qwen", _HEAD_8 | _DELTA_RULE | {"layer_types": _HYBRID["linear_attention"]}
    ),
    "qwen3_5_wrapper": Family(
        "Qwen3_5Config", "qwen", _HEAD_8 | _DELTA_RULE | {"layer_types": _HYBRID["linear_attention"]}
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig",
        "gpt2",
        _LLAMA_LIKE
        | _MAMBA
        | {
            "layer_types": _HYBRID["linear_attention"],
            "shared_intermediate_size": INNER,
            "num_local_experts": 0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 4.0,
        },
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        "llama2",
        _LLAMA_LIKE
        | _MAMBA
        | {
            "mamba_d_ssm": 2 * HIDDEN,
            "mlp_multipliers": [0.5, 0.5],
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.5,
        },
    ),
}
_SPARSE: dict[str, Any] = _HEAD_8 | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_QWEN3_5_MOE = (
    _SPARSE
    | _DELTA_RULE
    | {
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "layer_types": _HYBRID["linear_attention"],
    }
)
_ROUTED = {
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "qwen",
        _SPARSE | {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", "qwen", _SPARSE | {"num_experts": 4, "shared_expert_intermediate_size": 16}
    ),
    "mixtral": Family(
        "MixtralConfig", "llama2", _HEAD_8 | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "olmoe": Family("OlmoeConfig", "neox", _LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": Family(
        "GptOssConfig",
        "gpt2",
        _HEAD_8
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * LAYERS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "qwen",
        _SPARSE
        | _DELTA_RULE
        | {
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [0],
            "layer_types": _HYBRID["linear_attention"],
        },
    ),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", "qwen", _QWEN3_5_MOE),
    "qwen3_5_moe_wrapper": Family("Qwen3_5MoeConfig", "qwen", _QWEN3_5_MOE),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "llama3",
        _LLAMA_LIKE
        | {
            "num_key_value_heads": HEADS,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
ROUTED = tuple(_ROUTED)
"""Mixtures of experts; tests/editors/test_experts.py runs on these."""
MORE = tuple(_MORE)
"""Families beside those that every test runs on; tests/editors/test_more_families.py runs on these."""
RECURRENT = ("lfm2", "qwen3_5", "qwen3_5_wrapper", "granite_hybrid", "falcon_h1", "qwen3_next", "qwen3_5_moe")
"""Families with layers that keep a state in place of keys and values; tests/editors/test_recurrent.py runs on these."""
_WRAPPED = {
    "gemma3_wrapper": "Gemma3TextConfig",
    "gemma4_wrapper": "Gemma4TextConfig",
    "mistral3": "MistralConfig",
    "qwen3_5_wrapper": "Qwen3_5TextConfig",
    "qwen3_5_moe_wrapper": "Qwen3_5MoeTextConfig",
}
QUANTISED = ("llama-nf4", "llama-int8", "gemma3-nf4", "phi3-int8", "t5-nf4")
"""A family and how bitsandbytes quantises it; for `fresh` and `make`."""
DECODERS = tuple(name for name in FAMILIES if name not in ENCODER_DECODER)


def parts(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh model of a family in `FAMILIES` (the same weights every time) and its tokenizer."""
    return copy.deepcopy(_made(family, dtype))


@cache
def _made(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """What `parts` gives copies of."""
    row = (_FAMILIES | _MORE | _ROUTED)[family]
    words = tokenizer(row.tokenizer)
    fields = row.fields | {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    if family in _WRAPPED:
        fields = _around(getattr(transformers, _WRAPPED[family])(**fields))
    config = getattr(transformers, row.config)(**fields)
    auto: Any = transformers.AutoModelForCausalLM
    if family in _WRAPPED:
        auto = transformers.AutoModelForImageTextToText
    if family in ENCODER_DECODER:
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):  # some biases of image towers start at random
        torch.manual_seed(0)
        model = auto.from_config(config)
    return seeded(model, dtype), words


def quantised(family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny model as bitsandbytes quantises it while it loads; "llama-nf4" say."""
    name, _, how = family.rpartition("-")
    model, words = parts(name, dtype)
    options: dict[str, Any] = {"load_in_8bit": True}
    if how == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": how, "bnb_4bit_compute_dtype": dtype}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ready = type(model).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device.chosen,
            quantization_config=transformers.BitsAndBytesConfig(**options),
        )
    return ready, words


def _around(text: Any) -> dict[str, Any]:
    """The fields of a model that also reads images, around a text model, with the smallest eye there is."""
    eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye |= {"image_size": 16, "patch_size": 8, "head_dim": 8, "out_hidden_size": HIDDEN}
    return {"text_config": text, "vision_config": eye}


def seeded(model: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Fill a model with the same random weights every time."""
    generator = torch.Generator().manual_seed(20_22)
    vocabulary = model.config.get_text_config().vocab_size  # rows of embeddings and head
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_((2 if parameter.shape[0] == vocabulary else 1) * SPREAD * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # the factor of a layer's output (Gemma 4)
                buffer.fill_(0.9)
    ready: PreTrainedModel = model.to(dtype).eval()
    return ready


def fresh(family: str, dtype: torch.dtype = torch.float32) -> LM:
    """A model of one's own, to change at will."""
    return copy.deepcopy(_loaded(family, dtype))


@cache
def _loaded(family: str, dtype: torch.dtype) -> LM:
    """What `fresh` gives copies of: to recognise a model takes longer than to copy it."""
    model, words = quantised(family, dtype) if family.endswith(("-nf4", "-int8")) else parts(family, dtype)
    return LM(model.to(device.chosen), words, f"tiny-{family}")  # type: ignore[arg-type]


@cache
def make(family: str, dtype: torch.dtype = torch.float32) -> LM:
    """The model of a family that all tests of a session share: read it, never leave it changed."""
    return fresh(family, dtype)


def save_to(family: str, directory: Path) -> Path:
    """Write a tiny model as a Hugging Face directory, for tests that load one from disk."""
    model, words = parts(family)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
