"""Fine-tuning learns and preserves, batches can be split, and adapters compute what the PEFT library computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from editors import METHODS
from editors.edit import Edit, Neighbour
from editors.errors import EditError, InvalidEdit
from editors.finetune.adapter import AdapterPatch, Dora, Ia3
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import ExampleOptions, examples
from editors.finetune.key_directions import ModuleKeys, key_directions
from editors.finetune.peft_import import read_adapter
from editors.finetune.training import Training
from editors.method import EditContext
from editors.model.deltas import LowRank
from editors.model.lm import END, LM
from editors.moments import Statistics
from editors.patch import LivePatch, Patch, WeightPatch, join_deltas, save
from editors.patch_kinds import load
from editors.prompt_templates import OTHER_SUBJECTS
from tests.families import FAMILIES, fresh, make, save_to

FACTS = (
    Edit(subject="France", prompt="The capital of {} is", target="Rome"),
    Edit(subject="Japan", prompt="The language of {} is", target="French"),
)
QUICK: dict[str, Any] = {"max_steps": 40, "contexts": 1, "others": 1, "keep_weight": 0.1}


def learn(lm: LM, method: str, *edits: Edit, **params: Any) -> Patch:
    editor = METHODS[method]
    given = editor.params(**QUICK | params)
    return editor.compute(lm, edits, given, EditContext(Statistics(Path("nowhere"), "none")))


@torch.no_grad()
def logits(lm: LM, text: str = "The capital of France is") -> Tensor:
    ids = torch.tensor([lm.encode(lm.prompt(text))[0]], device=lm.model.device)
    extra = {"decoder_input_ids": torch.zeros_like(ids[:, :1])} if lm.is_seq2seq else {}
    result: Tensor = lm.model(input_ids=ids, **extra).logits
    return result


def with_patch(lm: LM, patch: Patch, text: str = "The capital of France is") -> Tensor:
    if isinstance(patch, LivePatch):
        detach = patch.attach(lm)
        try:
            return logits(lm, text)
        finally:
            detach()
    with lm.patched(join_deltas([patch])):
        return logits(lm, text)


def probability(lm: LM, patch: Patch, edit: Edit) -> float:
    if isinstance(patch, LivePatch):
        detach = patch.attach(lm)
        try:
            return lm.score([(lm.prompt(edit.text), edit.target)])[0].logprob
        finally:
            detach()
    with lm.patched(join_deltas([patch])):
        return lm.score([(lm.prompt(edit.text), edit.target)])[0].logprob


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("ft", {"lr": 3e-2}),
        ("ft", {"lr": 3e-2, "variant": "ft-l", "bound": 0.2}),
        ("lora", {"lr": 5e-2}),
        ("lora", {"lr": 5e-2, "rslora": True}),
        ("lora", {"lr": 5e-2, "dora": True}),
        ("adalora", {"lr": 1e-1}),
        ("ia3", {"lr": 3e-1, "layers": (0, 1, 2, 3)}),
    ],
)
def test_the_target_becomes_far_more_probable(method: str, params: dict[str, Any], family: str) -> None:
    lm = make(family)
    before = lm.score([(lm.prompt(FACTS[0].text), FACTS[0].target)])[0].logprob
    patch = learn(lm, method, FACTS[0], **params)
    gain = 0.3 if method == "ia3" or "bound" in params else 1.0
    assert probability(lm, patch, FACTS[0]) > before + gain


def test_training_stops_when_the_target_is_learned() -> None:
    lm, reports = make("llama"), []
    context = EditContext(Statistics(Path("nowhere"), "none"), report=lambda f, m: reports.append(f))
    editor = METHODS["ft"]
    quick = {"layers": (3,), "lr": 3e-2, "max_steps": 200, "stop_probability": 0.5, "keep_weight": 0.0}
    params = editor.params(**QUICK | quick)
    patch = editor.compute(lm, FACTS[:1], params, context)
    assert len(reports) < 200
    with lm.patched(join_deltas([patch])):
        (answer,) = lm.generate([lm.prompt(FACTS[0].text)], 5)
    assert answer.text.strip().startswith("Rome")


def test_ft_l_moves_no_weight_further_than_its_bound() -> None:
    lm = make("gpt2")
    patch = learn(lm, "ft", FACTS[0], variant="ft-l", bound=1e-3, lr=1e-2, max_steps=10)
    assert isinstance(patch, WeightPatch)
    (delta,) = patch.deltas.values()
    assert delta.dense().abs().max() == pytest.approx(1e-3)


def test_fine_tuning_moves_the_weight_along_the_keys_learned_at_alone() -> None:
    """At most six keys of the subject, one for each template; plain fine-tuning moves along all inputs."""
    ranks = {}
    for project in (True, False):
        patch = learn(make("llama"), "ft", FACTS[0], contexts=6, max_steps=4, project=project)
        assert isinstance(patch, WeightPatch)
        (delta,) = patch.deltas.values()
        ranks[project] = int(torch.linalg.matrix_rank(delta.dense(), rtol=1e-4))
    assert ranks[True] <= 6 < ranks[False]


def test_two_layers_are_trained_together() -> None:
    patch = learn(make("llama"), "lora", FACTS[0], layers=(1, 3), max_steps=2)
    assert isinstance(patch, WeightPatch)
    assert list(patch.deltas) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 3)]


@pytest.mark.parametrize("method", ["ft", "lora", "adalora", "ia3"])
def test_a_layer_that_does_not_exist_is_refused(method: str) -> None:
    with pytest.raises(InvalidEdit, match="layers 0 to 3"):
        learn(make("llama"), method, FACTS[0], layers=(4,))


@pytest.mark.parametrize(
    ("method", "params"), [("ft", {}), ("lora", {}), ("lora", {"dora": True}), ("ia3", {})]
)
def test_a_batch_without_its_second_edit_is_the_first_alone(method: str, params: dict[str, Any]) -> None:
    lm = make("llama")
    both = learn(lm, method, *FACTS, max_steps=3, **params)
    alone = learn(lm, method, FACTS[0], max_steps=3, **params)
    first = METHODS[method].subset(load(save(both)), [0], Statistics(Path("nowhere"), "none"))
    assert torch.equal(with_patch(lm, first), with_patch(lm, alone))
    assert not torch.equal(with_patch(lm, both), with_patch(lm, alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_batch_predicts_what_the_whole_model_does(family: str) -> None:
    lm = make(family)
    rows = examples(lm, FACTS[0], ExampleOptions(2, 2, True))
    logp = ExampleBatch(lm, 2, rows)().detach()
    row = rows[0]
    score = lm.score([(lm.prompt(FACTS[0].text), FACTS[0].target)])[0].logprob
    ids = [t for t in row.answer if t != END]
    answer = logp[: len(ids)].gather(1, torch.tensor(ids, device=lm.device)[:, None]).sum()
    assert float(answer) == pytest.approx(score, abs=1e-3)


def test_examples_have_target_rows_and_preserved_rows() -> None:
    lm = make("llama")
    edit = FACTS[0].model_copy(
        update={
            "paraphrases": ("France has the capital",),
            "neighbours": (Neighbour(prompt="The capital of Japan is"),),
        }
    )

    def texts(options: ExampleOptions, target: bool) -> list[str]:
        rows = [r for r in examples(lm, edit, options, FACTS[1:]) if bool(r.answer) == target]
        return [lm.tokenizer.decode(r.prompt, skip_special_tokens=True) for r in rows]

    assert texts(ExampleOptions(2, 0, True), True)[::2] == [
        "The capital of France is",
        "France has the capital",
    ]
    assert len(texts(ExampleOptions(2, 0, False), True)) == 2
    preserved = texts(ExampleOptions(1, len(OTHER_SUBJECTS), True), False)
    assert "The capital of Japan is" in preserved
    assert "The language of Japan is" in preserved  # learned before in the same call
    assert all("capital of France" not in text for text in preserved)


def test_key_directions_respond_to_target_keys_and_not_to_preserved_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    target, preserved = (torch.randn(n, 64, generator=generator) for n in (2, 12))
    directions = key_directions(ModuleKeys(target, preserved, 1.0), 4, ridge=1e-6)
    assert directions.shape == (2, 64)
    assert (directions @ target.t()).diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert (directions @ preserved.t()).abs().max() < 1e-3


@pytest.fixture(params=["llama", "gpt2", "t5"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peft_model(family: str, folder: Path, config: Any) -> Any:
    """A tiny model with a random PEFT adapter, as its library makes and saves one."""
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = peft.get_peft_model(kind.from_pretrained(save_to(family, folder / "base")), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(spread.abs() if "magnitude" in name or "ia3" in name else spread)
    model.save_pretrained(folder / "adapter")
    return model


TARGETS = {"llama": ["down_proj", "gate_proj"], "gpt2": ["mlp.c_proj"], "t5": ["wo"]}


@pytest.mark.parametrize("kind", ["lora", "rslora", "pattern", "dora", "ia3"])
def test_an_imported_adapter_computes_what_peft_computes(kind: str, family: str, tmp_path: Path) -> None:
    modules = TARGETS[family]
    fan = family == "gpt2"
    if kind == "ia3":
        names = [m.split(".")[-1] for m in modules][:1]
        config: Any = peft.IA3Config(target_modules=names, feedforward_modules=names, fan_in_fan_out=fan)
    else:
        more: dict[str, Any] = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(kind, {})
        if kind == "pattern":
            more = {"rank_pattern": {modules[0]: 5}, "alpha_pattern": {modules[0]: 3}}
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, fan_in_fan_out=fan, **more)
    lm = fresh(family)
    model = peft_model(family, tmp_path, config).to(lm.device)
    imported = read_adapter(lm, tmp_path / "adapter")
    assert imported.method == ("ia3" if kind == "ia3" else "lora")
    ours = with_patch(lm, load(save(imported.patch)))
    lm.model = model
    assert (logits(lm) - ours).abs().max() < 1e-4


def test_a_dora_edit_computes_what_peft_computes() -> None:
    left, right = torch.randn(32, 2), torch.randn(2, 64)
    lm = fresh("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    magnitude = (lm.weight(name).cpu() + left @ right).norm(dim=1)
    same = AdapterPatch([{name: Dora(left, right, magnitude)}])
    plain = WeightPatch({name: LowRank(left, right)})
    assert torch.allclose(with_patch(lm, same), with_patch(lm, plain), atol=1e-4)
    double = AdapterPatch([{name: Ia3(torch.full((64,), 2.0))}])
    twice = WeightPatch({name: LowRank(lm.weight(name).clone(), torch.eye(64))})
    assert torch.allclose(with_patch(lm, double), with_patch(lm, twice), atol=1e-4)


def test_a_folder_that_is_not_an_adapter_is_refused_with_the_reason(tmp_path: Path) -> None:
    lm = make("llama")
    folder = tmp_path / "broken"
    folder.mkdir()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(EditError, match=message):
            read_adapter(lm, folder)

    refused("no adapter_config.json")
    config.write_text('{"peft_type": "PREFIX_TUNING"}')
    refused("PREFIX_TUNING")
    config.write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused("pickled")
    weights.write_bytes(b"\x80\x04")
    refused("damaged")
    key = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
    weights.write_bytes(safetensors.torch.save({key.format(9, "A"): torch.ones(1, 64)}))
    refused("does not have")
    weights.write_bytes(safetensors.torch.save({key.format(1, "A"): torch.ones(1, 64)}))
    refused("lacks lora_A or lora_B")
    both = {key.format(1, "A"): torch.ones(1, 9), key.format(1, "B"): torch.ones(32, 1)}
    weights.write_bytes(safetensors.torch.save(both))
    refused("shape")


def test_the_answers_last_word_must_end_there() -> None:
    lm = make("llama")
    rows = [r for r in examples(lm, FACTS[0], ExampleOptions(1, 0, False)) if r.answer]
    assert [r.answer[-1] for r in rows] == [END]
    loss = Training(lm, rows, {}, 1).loss
    within = set(lm.within_words.tolist())
    words = lm.model.get_input_embeddings().weight.shape[0]
    stops = next(i for i in range(words) if i not in within)
    for after, learned in ((stops, True), (min(within), False)):
        logp = torch.full((len(rows[0].answer), words), -20.0, device=lm.device)
        for column, token in enumerate((*rows[0].answer[:-1], after)):
            logp[column, token] = -1e-3
        assert loss.is_learned(logp, 0.9) is learned
    other = FACTS[0].model_copy(update={"target": "東京"})
    assert END not in examples(lm, other, ExampleOptions(1, 0, False))[0].answer
