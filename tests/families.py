"""Tiny random models of every supported family, made from configs: seeded, whole in milliseconds.

Weights are larger than at a usual initialisation, so that logits differ clearly, and norms and
biases are not ones and zeros, so that a test notices when one of them is left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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
DECODERS = tuple(name for name in FAMILIES if name not in ENCODER_DECODER)


def parts(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh model of a family in `FAMILIES` (the same weights every time) and its tokenizer."""
    row = _FAMILIES[family]
    words = tokenizer(row.tokenizer)
    config = getattr(transformers, row.config)(
        **row.fields,
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    auto: Any = transformers.AutoModelForCausalLM
    if family in ENCODER_DECODER:
        auto = transformers.AutoModelForSeq2SeqLM
    return seeded(auto.from_config(config), dtype), copy.deepcopy(words)


def seeded(model: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Fill a model with the same random weights every time."""
    generator = torch.Generator().manual_seed(20_22)
    vocabulary = model.config.vocab_size  # rows of embeddings and head
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_((2 if parameter.shape[0] == vocabulary else 1) * SPREAD * noise)
    ready: PreTrainedModel = model.to(dtype).eval()
    return ready


def fresh(family: str, dtype: torch.dtype = torch.float32) -> LM:
    """A model of one's own, to change at will."""
    model, words = parts(family, dtype)
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
