"""Editing from Python, without a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from editors import LM, METHODS, Edit, applied, compute_patch
from editors.errors import InvalidEdit, Unsupported
from tests.conftest import ROOT, digest
from tests.families import fresh, make, parts

EDIT = Edit(subject="France", prompt="The capital of {} is", target="Rome")
STRONG = {"contexts": 1, "lr": 2.0, "clamp": 100.0, "max_steps": 60, "kl_weight": 0.0, "decay": 0.0}


def p_target(lm: LM) -> float:
    return lm.score([(lm.prompt(EDIT.text), EDIT.target)])[0].logprob


def test_a_patch_acts_while_the_block_runs_and_leaves_no_trace() -> None:
    lm = fresh("llama")
    before, weights = p_target(lm), digest(lm)
    patch = compute_patch(lm, [EDIT], "rome", {**STRONG, "mode": "simplified"})
    assert digest(lm) == weights
    with applied(lm, patch):
        assert p_target(lm) > before
    assert digest(lm) == weights
    assert p_target(lm) == before


def test_memories_act_too_and_several_patches_together() -> None:
    lm = fresh("llama")
    other = Edit(subject="Japan", prompt="The capital of {} is", target="Paris")
    one = compute_patch(lm, [EDIT], "rome", {**STRONG, "mode": "simplified"})
    two = compute_patch(lm, [other], "grace")
    before, hooks = p_target(lm), sum(len(m._forward_hooks) for m in lm.model.modules())
    with applied(lm, one, two):
        assert p_target(lm) > before
    assert p_target(lm) == before
    assert sum(len(m._forward_hooks) for m in lm.model.modules()) == hooks


def test_second_moments_are_kept_in_a_folder(tmp_path: Path) -> None:
    lm = make("llama")
    compute_patch(lm, [EDIT], "rome", {"max_steps": 1}, folder=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    compute_patch(lm, [EDIT], "rome", {"max_steps": 1}, folder=tmp_path)
    assert files[0].stat().st_mtime_ns == stamp


def test_a_method_that_does_not_work_on_the_model_is_refused() -> None:
    with pytest.raises(Unsupported, match="ft, lora, mend or serac"):
        compute_patch(make("t5"), [EDIT], "rome")


def test_a_wrong_layer_is_refused() -> None:
    with pytest.raises(InvalidEdit, match="layer"):
        compute_patch(make("llama"), [EDIT], "rome", {"layer": 99})


def test_the_example_of_the_guide_runs() -> None:
    guide = (ROOT / "docs" / "library.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    model, tokenizer = parts("llama")
    names: dict[str, object] = {"model": model, "tokenizer": tokenizer}
    code = code[code.index("lm = LM(") :]  # the lines before it load the model from a hub
    shown: list[str] = []
    names |= {"LM": LM, "Edit": Edit, "applied": applied, "compute_patch": compute_patch, "METHODS": METHODS}
    exec(compile(code, "library.md", "exec"), {**names, "print": lambda *text: shown.append(str(text))})
    assert len(shown) == 2
    assert torch.is_inference_mode_enabled() is False


def test_the_guide_locates_a_fact_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "docs" / "library.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", guide.partition("## Locating")[2], re.DOTALL)[0]
    lm = fresh("llama")
    before, shown = digest(lm), list[str]()
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "library.md", "exec"), {"lm": lm, "print": lambda *text: shown.append(str(text))})
    assert len(shown) == 4
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert digest(lm) == before
