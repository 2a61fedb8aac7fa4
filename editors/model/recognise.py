"""Finds the row of the table of families for a loaded model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from editors.errors import Unsupported
from editors.model.architecture import ARCHITECTURES, EXPERTS_OUT, Architecture, has_module, resolve, t5_row
from editors.model.quantised import is_plain, quantisation, refuse_non_linear


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
            f"{kind} has mixture-of-experts layers of an unknown kind; known are {', '.join(known)}. Load one "
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
    """The row with the fields that depend on the model's config, not on the family alone."""
    kind = config.model_type
    if kind == "opt" and model.get_submodule("model.decoder").project_out is not None:
        row = replace(row, project_out="model.decoder.project_out")
    if kind == "t5" and config.is_gated_act:
        row = t5_row("t5", ("wi_0", "wi_1"))
    if kind == "t5" and config.tie_word_embeddings:
        row = replace(row, scales_head_input=True)
    if kind.startswith("granite"):
        row = replace(row, residual_scale=config.residual_multiplier, logit_scale=1 / config.logits_scaling)
    if kind.startswith("cohere"):
        row = replace(row, logit_scale=config.logit_scale)
    if row.streams_out is not None:
        row = replace(row, streams=config.altup_num_inputs)
    if kind == "falcon_h1":
        row = replace(
            row,
            residual_scale=config.mlp_multipliers[1],
            embed_scale=config.embedding_multiplier,
            logit_scale=config.lm_head_multiplier,
        )
    return row


def _resembles(model: nn.Module) -> str:
    """A sentence on the known family whose parts this model has too; empty where there is none."""
    for kind, row in ARCHITECTURES.items():
        if not all(has_module(model, path) for path in (row.layers, row.norm, row.head, row.embed)):
            continue
        layers = list(resolve(model, row.layers).children())
        if layers and all(
            has_module(layer, path) for layer in layers for path in (row.attn_out, *row.mlp_in, row.mlp_out)
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
            f"the layers of this model are quantised ({type(first).__name__}) in an unknown way, so their "
            f"weights cannot take an exact delta. Load the model unquantised, in float32, bfloat16 or float16, or with "
            "--quantize nf4 or int8."
        )
    refuse_non_linear(f"{row.layers}.{index}.{path}", first, model.dtype)  # type: ignore[arg-type]
