"""Adapters as the PEFT library makes them: what loading one with PEFT answers is the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from editors.errors import EditError
from editors.finetune.peft_import import read_adapter
from editors.finetune.shared_weights import off_shared_weights
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import Patch, WeightPatch, save
from editors.patch_kinds import load
from server.transaction.host import ActivePatch, ModelHost
from tests.families import fresh, save_to

TEXTS = ["The capital of France is Paris", "Big Ben is located in the city of London"]
ATTENTION_AND_MLP = ["q_proj", "down_proj"]


def made_by_peft(family: str, folder: Path, config: Any) -> tuple[LM, Any]:
    """A tiny model, and the same as PEFT loads it with a random adapter of this configuration."""
    base = save_to(family, folder / "base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                spread = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(spread.abs() if "magnitude" in name or "ia3" in name else spread)
    model.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    lm = fresh(family)
    assert (logits(lm, loaded) - logits(lm, model)).abs().max() < 1e-3, "PEFT itself does not load it rightly"
    return lm, loaded.eval()


@torch.no_grad()
def logits(lm: LM, model: Any) -> torch.Tensor:
    ids, mask = lm.pad([lm.tokenizer(text)["input_ids"] for text in TEXTS])
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]  # type: ignore[no-any-return]


def active(patch: Patch) -> ActivePatch:
    return ActivePatch(1, 1, "lora", patch, (0,), "1")


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ATTENTION_AND_MLP},
    "pissa": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "pissa"},
    "pissa with rslora": {
        "target_modules": ATTENTION_AND_MLP,
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 5},
    },
    "olora": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "olora"},
    "gaussian": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "orthogonal", "r": 4},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "down_proj"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora and head": {"target_modules": ["lm_head", "down_proj"], "use_dora": True},
    "saved head": {"target_modules": ATTENTION_AND_MLP, "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "lora bias": {"target_modules": ATTENTION_AND_MLP, "lora_bias": True},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_imported_adapter_answers_as_peft_does_and_is_taken_back_exactly(
    kind: str, family: str, tmp_path: Path
) -> None:
    more = {"r": 3} | CONFIGS[kind]
    lm, truth = made_by_peft(family, tmp_path, peft.LoraConfig(lora_alpha=7, task_type="CAUSAL_LM", **more))
    host = ModelHost(lm)
    plain = logits(lm, lm.model)
    imported = read_adapter(lm, tmp_path / "adapter")
    assert host.borrowed() == []
    assert host.rehash() == host.base_hash
    host.set_stack([active(load(save(imported.patch)))])
    ours, theirs = logits(lm, lm.model), logits(lm, truth)
    assert (theirs - plain).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-3
    host.set_stack([])
    assert host.rehash() == host.base_hash
    assert torch.equal(logits(lm, lm.model), plain)


def test_biases_that_were_trained_are_taken_over(tmp_path: Path) -> None:
    for bias in ("all", "lora_only"):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)  # type: ignore[arg-type]
        lm, truth = made_by_peft("gpt2", tmp_path / bias, config)
        patch = read_adapter(lm, tmp_path / bias / "adapter").patch
        assert isinstance(patch, WeightPatch)
        assert any(name.endswith(".bias") for name in patch.deltas)
        host = ModelHost(lm)
        host.set_stack([active(patch)])
        assert (logits(lm, lm.model) - logits(lm, truth)).abs().max() < 1e-3
        host.set_stack([])
        assert host.rehash() == host.base_hash


def test_ia3_of_attention_and_mlp_answers_as_peft_does(tmp_path: Path) -> None:
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    lm, truth = made_by_peft("qwen2", tmp_path, config)
    host = ModelHost(lm)
    host.set_stack([active(load(save(read_adapter(lm, tmp_path / "adapter").patch)))])
    assert (logits(lm, lm.model) - logits(lm, truth)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights='corda'.*path_initial_model_for_weight_conversion",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights='pissa_niter_16'.*random numbers.*conversion",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'.*merge_and_unload"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "of tomorrow"}, "'of tomorrow', which is not known here"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora together with"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"peft_type": "LOHA"}, "'LOHA'.*merge_and_unload"),
    ],
)
def test_what_cannot_be_imported_is_named_before_anything_changes(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    lm, _ = made_by_peft("llama", tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EditError, match=said):
        read_adapter(lm, tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_named_with_the_reason(tmp_path: Path) -> None:
    lm, _ = made_by_peft("llama", tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    own = safetensors.torch.load_file(file)
    head, embed = (lm.model.get_parameter(n).data for n in ("lm_head.weight", "model.embed_tokens.weight"))
    prefix = "base_model.model."
    for more, said in (
        ({"lm_head.weight": head + 1}, "neither bias nor modules_to_save name it"),
        ({"model.embed_tokens.base_layer.weight": embed + 1}, "made on another base model"),
        ({"model.embed_tokens.weight": torch.zeros(3, 32)}, "vocabulary that was resized"),
        ({"model.layers.0.mlp.up_proj.lora_C.weight": head}, "no part of a LoRA or IA3 adapter"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}, "lacks lora_A or lora_B"),
        ({"model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}, "does not have"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": torch.full((2, 32), torch.nan)}, "not finite"),
    ):
        safetensors.torch.save_file(own | {prefix + k: v.contiguous() for k, v in more.items()}, file)
        with pytest.raises(EditError, match=said):
            read_adapter(lm, tmp_path / "adapter")
    safetensors.torch.save_file(own | {f"{prefix}lm_head.weight": head.clone()}, file)
    assert isinstance(read_adapter(lm, tmp_path / "adapter").patch, WeightPatch)  # a copy of the model's own


def test_a_recorded_change_of_a_tied_head_acts_on_the_head_alone() -> None:
    lm = fresh("qwen2")
    embed = lm.model.get_parameter("model.embed_tokens.weight")
    left, right = torch.randn(len(embed), 2), torch.randn(2, embed.shape[1])
    patch = off_shared_weights(lm, WeightPatch({"lm_head.weight": LowRank(left, right)}))
    plain = logits(lm, lm.model)
    host = ModelHost(lm)
    host.set_stack([active(patch)])
    assert host.rehash() == host.base_hash
    assert (logits(lm, lm.model) - plain).abs().max() > 0.1
    host.set_stack([])
    assert torch.equal(logits(lm, lm.model), plain)
