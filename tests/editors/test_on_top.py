"""Every method computes on top of every kind of patch that acts beside the weights, also in a lowered search."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from editors import METHODS
from editors.edit import Edit
from editors.finetune.adapter import AdapterPatch
from editors.finetune.lora import LoraParams
from editors.method import EditContext, Prior
from editors.model import precision
from editors.model.lm import LM
from editors.patch import LivePatch, Patch
from editors.patch_kinds import KINDS
from editors.steering.stack import Dose
from server.transaction.host import ActivePatch, ModelHost
from tests.editors.conftest import StatisticsOf
from tests.editors.test_contract import params_of
from tests.editors.trained import trained_for
from tests.families import fresh, make

BELOW = Edit(subject="France", prompt="The capital of {} is", target="Berlin")
ABOVE = Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi")
BESIDE = ("ia3", "dora", "serac", "wise", "grace", "in_context", "steering", "map")
CASES = [("llama", "float32"), ("llama", "lowered search"), ("gpt2", "lowered search"), ("t5", "float32")]


def dose(lm: LM, with_map: bool) -> Dose:
    generator = torch.Generator().manual_seed(1)
    added = {1: torch.randn(lm.d_model, generator=generator), 2: torch.randn(lm.d_model, generator=generator)}
    factors = [torch.randn(lm.d_model, 2, generator=generator) for _ in range(2)] if with_map else None
    return Dose(
        name="joy",
        multiplier=1.0,
        combine="add",
        prompt=not with_map,
        added=added,
        left=None if factors is None else 0.1 * factors[0],
        right=None if factors is None else 0.1 * factors[1].T,
        info={"name": "joy", "multiplier": 1.0, "combine": "add", "prompt": not with_map},
    )


@cache
def beside(kind: str, family: str, statistics_of: StatisticsOf) -> Patch:
    """A patch of this kind that says something about France, at the last layer: above what methods edit."""
    lm = make(family)
    top = lm.n_layers - 1
    if kind in ("steering", "map"):
        return dose(lm, kind == "map")
    if kind == "dora":
        context = EditContext(statistics_of(lm), trained=trained_for(lm))
        return METHODS["lora"].compute(
            lm, [BELOW], LoraParams(dora=True, max_steps=2, layers=(top,)), context
        )
    editor = METHODS[kind]
    fields = editor.params.model_fields
    params = params_of(editor).model_copy(
        update={name: value for name, value in {"layer": top, "layers": (0, top)}.items() if name in fields}
    )
    context = EditContext(statistics_of(lm), trained=trained_for(lm))
    return editor.compute(lm, [BELOW], params, context)


def test_every_kind_of_patch_beside_the_weights_is_tried(statistics_of: StatisticsOf) -> None:
    live = {kind for kind, made in KINDS.items() if issubclass(made, LivePatch)}
    tried = {beside(kind, "llama", statistics_of).kind for kind in BESIDE}
    assert tried == live
    assert isinstance(beside("dora", "llama", statistics_of), AdapterPatch)


@pytest.mark.parametrize(("family", "precision_of"), CASES)
@pytest.mark.parametrize("below", BESIDE)
def test_every_method_computes_on_top(
    precision_of: str,
    below: str,
    family: str,
    statistics_of: StatisticsOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda: precision_of == "lowered search")
    lm = fresh(family)
    method = "lora" if below == "dora" else below
    if method in METHODS and METHODS[method].supports(lm) is not None:
        pytest.skip(f"{method} refuses {family}")
    patch = beside(below, family, statistics_of)
    host = ModelHost(lm)
    trained_for(lm)
    first = ActivePatch(1, 1, method, patch, (0,), "1")
    host.set_stack([first])
    hash_before = host.rehash()
    prior = [Prior(method, patch, (0,))]
    context = EditContext(statistics_of(make(family)), prior, trained=trained_for(lm))
    for name, editor in METHODS.items():
        if editor.supports(lm) is not None:
            continue
        made = editor.compute(lm, [ABOVE], params_of(editor), context)
        assert all(bool(t.isfinite().all()) for t in made.tensors().values() if t.is_floating_point()), name
        assert host.borrowed() == [], name
        host.set_stack([first, ActivePatch(2, 2, name, made, (0,), "2")])
        scores = lm.score([(lm.prompt(e.text), e.target) for e in (BELOW, ABOVE)])
        assert all(score.logprob <= 0 for score in scores), name
        host.set_stack([first])
    assert host.rehash() == hash_before
