"""Edits as GGUF files: what llama.cpp reads is the change that the ledger holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from editors.edit import Edit
from editors.model.deltas import LowRank
from server.errors import ServiceError
from server.exchange.gguf_files import GgufLayout, write_lora
from server.models import default_model
from server.models import loading as models
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.families import fresh
from tests.server.opened import FACTS, STRONG, open_services

PLAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")


def lora_of(path: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    """The file, and by tensor the change that llama.cpp adds: alpha / rank * b @ a."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    parts = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = {name.rpartition(".lora_")[0] for name in parts}
    return reader, {
        name: alpha / parts[f"{name}.lora_b"].shape[1] * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
        for name in names
    }


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_a_gguf_lora_adds_the_change_of_every_matrix_whatever_its_rank(family: str, tmp_path: Path) -> None:
    lm = fresh(family)
    deltas = {}
    for layer, rank in ((0, 1), (2, 3)):
        name = lm.mlp_out(layer)
        d_out, d_in = lm.weight(name).shape
        deltas[name] = LowRank(torch.randn(d_out, rank), torch.randn(rank, d_in))
    write_lora(lm, deltas, {"edits": ["e1"]}, tmp_path / "x.gguf")
    reader, added = lora_of(tmp_path / "x.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert json.loads(reader.fields["errata.about"].contents()) == {"edits": ["e1"]}
    assert added.keys() == {"blk.0.ffn_down.weight", "blk.2.ffn_down.weight"}
    for layer in (0, 2):
        expected = deltas[lm.mlp_out(layer)].dense().numpy()
        np.testing.assert_allclose(added[f"blk.{layer}.ffn_down.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_query_rows_of_a_llama_stand_in_rotary_pairs() -> None:
    layout = GgufLayout(fresh("llama"))
    heads = layout.config.num_attention_heads
    size = layout.config.hidden_size // heads
    rows = torch.arange(heads * size)[:, None]
    ordered = layout.rows("model.layers.0.self_attn.q_proj.weight", rows)[:, 0].tolist()
    expected = [
        h * size + part * size // 2 + i for h in range(heads) for i in range(size // 2) for part in (0, 1)
    ]
    assert ordered == expected
    assert torch.equal(layout.rows("model.layers.0.mlp.down_proj.weight", rows), rows)


def test_what_gguf_has_no_name_for_is_refused_with_another_way(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="convert_hf_to_gguf"):
        GgufLayout(fresh("t5"))
    layout = GgufLayout(fresh("gpt_neox"))
    with pytest.raises(ServiceError, match="merged"):
        layout.name("gpt_neox.layers.0.attention.query_key_value.weight")
    services = open_services(tmp_path / "home")
    services.edits.apply(FACTS[:1], method="rome", params=STRONG)
    with pytest.raises(ServiceError, match="gguf_lora"):  # the tiny model was not loaded from a GGUF file
        services.exchange.export_edits("gguf", "whole")
    with pytest.raises(ServiceError, match="gguf_type"):
        services.exchange.export_edits("lora", "adapter", gguf_type="f16")
    report = services.exchange.export_edits("gguf_lora", "small")
    assert Path(report.path).is_file()
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-3
    services.close()


# --- llama.cpp itself ----------------------------------------------------------------------------

FACT = Edit(subject="France", prompt="The capital of {} is", target="Lyon")
OTHER = "The capital of Germany is"


@pytest.fixture(scope="module")
def exports(default_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The default model with one edit, as a LoRA and as a whole GGUF model."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, models=default_models, device="cpu", dtype="float32")
    with Ledger.open(home) as ledger:
        services = Services.open(settings, models.load(settings, lambda *_: None), ledger, lambda *_: None)
        services.edits.apply([FACT], method="rome", params={"mode": "simplified"})
        export = services.exchange.export_edits
        yield {
            "lora": Path(export("gguf_lora", "lyon").path),
            "q8_0": Path(export("gguf", "whole", gguf_type="q8_0").path),
        }
        services.close()


def answers(model: Path, lora: Path | None = None, scale: float = 1.0) -> list[str]:
    """llama.cpp's greedy answers to the edited prompt and to another one."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), scale)]
    server = xllamacpp.Server(params)
    said = []
    for prompt in (FACT.text, OTHER):
        asked = {"prompt": prompt, "n_predict": 4, "temperature": 0.0, "cache_prompt": False}
        reply = server.handle_completions(asked)
        said.append(reply["choices"][0]["text"])
    return said


def test_llama_cpp_says_the_corrected_fact_with_the_lora_and_the_old_one_at_scale_0(
    exports: dict[str, Path],
) -> None:
    base = default_model.installed_file()
    assert base is not None
    edited, other = answers(base, exports["lora"])
    assert edited.strip().startswith("Lyon")
    assert answers(base, exports["lora"], scale=0.0) == answers(base)
    assert other.strip().startswith("Berlin")


def test_llama_cpp_says_the_corrected_fact_from_the_whole_model(exports: dict[str, Path]) -> None:
    edited, other = answers(exports["q8_0"])
    assert edited.strip().startswith("Lyon")
    assert other.strip().startswith("Berlin")
