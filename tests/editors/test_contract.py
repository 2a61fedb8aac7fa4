"""What every method in the table promises, on tiny models of every family.

A new method is tested here by standing in the table. Methods whose patches are not weights are
tested through the same host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from editors import METHODS
from editors.closed_form.neurons import taken_over
from editors.closed_form.value_params import ValueParams
from editors.edit import Edit, Neighbour
from editors.errors import Cancelled, EditError
from editors.method import EditContext, Editor, Prior
from editors.model.lm import LM, hash_tensor
from editors.patch import TRAINED_ON, Patch, save, trained_prompts
from editors.patch_kinds import KINDS, load
from editors.steering.stack import Dose
from editors.steering.vector import SteeringVector
from server.transaction.host import ActivePatch, ModelHost
from tests.editors.conftest import StatisticsOf
from tests.editors.trained import trained_for
from tests.families import FAMILIES, QUANTISED, fresh, make

EDITS = (
    Edit(subject="France", prompt="The capital of {} is", target="Berlin"),
    Edit(subject="Costa Rica", prompt="The currency of {} is the", target="Russian"),
    Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi"),
)
Cell = tuple[str, str, torch.dtype]

LOWERED = ("llama", "gpt2", "gemma3", "t5")
"""Families that are tried in bfloat16 too: one like most, transposed weights, norms in float32, weights in float32."""
MODELS = [(f, torch.float32) for f in (*FAMILIES, QUANTISED[0])] + [(f, torch.bfloat16) for f in LOWERED]
EACH_KIND = ("rome", "ft", "lora", "ia3", "grace", "constrained", "wise", "serac")
"""Methods that make every kind of patch between them. These are put on a model of every family."""
EVERY_METHOD = [
    ("llama", torch.float32),
    ("gpt2", torch.bfloat16),
    ("t5", torch.float32),
    (QUANTISED[0], torch.float32),
]
"""Models on which the patches of all methods are put: what the host does with a patch follows from its kind."""
PUT_ON: list[Cell] = [
    (method, *model) for method in METHODS for model in MODELS if method in EACH_KIND or model in EVERY_METHOD
]

QUICK = {"max_steps": 2, "steps": 2}  # long searches promise nothing more here


def params_of(editor: Editor[Any]) -> Any:
    """The method's defaults, with searches cut short."""
    fields = editor.params.model_fields
    quick: dict[str, Any] = {name: value for name, value in QUICK.items() if name in fields}
    if "search" in fields:
        quick["search"] = ValueParams(max_steps=QUICK["max_steps"])
    return editor.params(**quick)


def compute(
    statistics_of: StatisticsOf, editor: Editor[Any], lm: LM, *edits: Edit, prior: Sequence[Prior] = ()
) -> Patch:
    return editor.compute(
        lm, edits, params_of(editor), EditContext(statistics_of(lm), prior, trained=trained_for(lm))
    )


_computed: dict[tuple[Any, ...], bytes] = {}


def computed(
    statistics_of: StatisticsOf, method: str, family: str, dtype: torch.dtype, *edits: Edit
) -> Patch:
    """The patch of these edits for a model of a family, computed once for all tests; a copy for each."""
    key = (method, family, dtype, *(edit.text for edit in edits))
    if key not in _computed:
        _computed[key] = save(compute(statistics_of, METHODS[method], make(family, dtype), *edits))
    return load(_computed[key])


def supported(method: str, lm: LM) -> Editor[Any]:
    editor = METHODS[method]
    if editor.supports(lm) is not None:
        pytest.skip(f"{method} refuses {lm.arch.family}")
    return editor


def everything(lm: LM) -> dict[str, Any]:
    """All a method could have changed: tensors and where they lie, flags, hooks, attributes, randomness."""
    state: dict[str, Any] = {"random": hash_tensor(torch.random.get_rng_state())}
    if lm.device.type == "cuda":
        state["random on cuda"] = hash_tensor(torch.cuda.get_rng_state(lm.device))
    for name, tensor in [*lm.model.named_parameters(), *lm.model.named_buffers()]:
        state[name] = (hash_tensor(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None)
    for name, module in lm.model.named_modules():
        state[f"{name}()"] = (module.training, *_hooks(module), sorted(vars(module)))
    state["config"] = (lm.model.config.to_dict(), lm.model.generation_config.to_dict())
    return state


def _hooks(module: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for kind in kinds]


def active(number: int, method: str, patch: Patch, rows: int = 1) -> ActivePatch:
    return ActivePatch(
        patch_id=number,
        position=number,
        method=method,
        patch=patch,
        rows=tuple(range(rows)),
        blob=str(number),
    )


@pytest.mark.parametrize(("family", "dtype"), MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_computing_changes_nothing(
    method: str, family: str, dtype: torch.dtype, statistics_of: StatisticsOf
) -> None:
    lm = make(family, dtype)
    editor = supported(method, lm)
    context = EditContext(statistics_of(lm), trained=trained_for(lm))
    before = everything(lm)
    patch = editor.compute(lm, EDITS, params_of(editor), context)
    assert everything(lm) == before
    _computed[(method, family, dtype, *(edit.text for edit in EDITS))] = save(patch)


@pytest.mark.parametrize("method", METHODS)
def test_a_cancelled_computation_changes_nothing(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    editor = supported(method, lm)
    reports: list[float] = []
    stop_at = 0  # the report that raises; 0: none

    def report(fraction: float, message: str) -> None:
        assert 0 <= fraction <= 1
        reports.append(fraction)
        if len(reports) == stop_at:
            raise Cancelled("stop")

    context = EditContext(statistics_of(lm), report=report, trained=trained_for(lm))
    editor.compute(lm, EDITS, params_of(editor), context)
    assert len(reports) >= len(EDITS), "a computation must report, for that is where it can be cancelled"
    stop_at = min(4, len(reports))
    reports.clear()
    before = everything(lm)
    with pytest.raises(Cancelled):
        editor.compute(lm, EDITS, params_of(editor), context)
    assert everything(lm) == before


def test_every_kind_of_patch_is_put_on_every_family(statistics_of: StatisticsOf) -> None:
    kinds = {m: computed(statistics_of, m, "llama", torch.float32, EDITS[0]).kind for m in METHODS}
    assert {kinds[method] for method in EACH_KIND} == set(kinds.values())
    assert set(KINDS) - set(kinds.values()) == {Dose.kind, SteeringVector.kind}, "a kind that no method makes"


@pytest.mark.parametrize(("method", "family", "dtype"), PUT_ON)
def test_applied_then_removed_is_bit_equal(
    method: str, family: str, dtype: torch.dtype, statistics_of: StatisticsOf
) -> None:
    lm = fresh(family, dtype)
    supported(method, lm)
    patch = computed(statistics_of, method, family, dtype, EDITS[0])
    trained_for(lm)
    host = ModelHost(lm)
    before, tensors = host.rehash(), everything(lm)
    host.set_stack([active(1, method, patch)])
    assert host.rehash() != before or patch.kind != "weight"
    host.set_stack([])
    assert host.rehash() == before == host.base_hash
    assert everything(lm) == tensors


@pytest.mark.parametrize(("method", "family", "dtype"), PUT_ON)
def test_saved_loaded_and_replayed_gives_the_same_model(
    method: str, family: str, dtype: torch.dtype, statistics_of: StatisticsOf
) -> None:
    lm = fresh(family, dtype)
    supported(method, lm)
    patch = computed(statistics_of, method, family, dtype, *EDITS)
    host, other = ModelHost(lm), ModelHost(fresh(family, dtype))
    host.set_stack([active(1, method, patch, len(EDITS))])
    other.set_stack([active(1, method, load(save(patch)), len(EDITS))])
    assert host.rehash() == other.rehash()
    assert answers(host.lm) == answers(other.lm)


@pytest.mark.parametrize(("method", "family", "dtype"), PUT_ON)
def test_a_middle_patch_removed_equals_never_having_applied_it(
    method: str, family: str, dtype: torch.dtype, statistics_of: StatisticsOf
) -> None:
    lm = fresh(family, dtype)
    supported(method, lm)
    patches: list[ActivePatch] = []
    for i, edits in enumerate((EDITS[:1], EDITS, EDITS[1:2])):
        patch = computed(statistics_of, method, family, dtype, *edits)
        if taken_over(patch):  # it must know what the others have taken over
            prior = [Prior(method, each.patch, each.rows) for each in patches]
            patch = compute(statistics_of, METHODS[method], make(family, dtype), *edits, prior=prior)
        patches.append(active(i, method, patch, len(edits)))
    host, never = ModelHost(lm), ModelHost(fresh(family, dtype))
    for i in range(3):
        host.set_stack(patches[: i + 1])
    three = host.rehash()
    host.set_stack([patches[0], patches[2]])
    never.set_stack([patches[0]])
    never.set_stack([patches[0], patches[2]])
    assert host.rehash() == never.rehash()
    assert host.weights_hash == host.rehash()  # what the host believes is what is there
    host.set_stack(patches)
    assert host.rehash() == three


@pytest.mark.parametrize("method", METHODS)
def test_computing_twice_gives_the_same_bits(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    editor = supported(method, lm)
    one, two = (compute(statistics_of, editor, lm, *EDITS).tensors() for _ in range(2))
    assert {k: hash_tensor(v) for k, v in one.items()} == {k: hash_tensor(v) for k, v in two.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_says_what_would_work(method: str, family: str, statistics_of: StatisticsOf) -> None:
    lm = make(family)
    refusal = METHODS[method].supports(lm)
    if refusal is None:
        assert computed(statistics_of, method, family, lm.dtype, EDITS[0]).tensors()
        return
    assert lm.arch.family in refusal
    named = [each for each in METHODS if each != method and re.search(rf"\b{each}\b", refusal)]
    assert named, "it names no method to use instead"
    assert not [each for each in named if METHODS[each].supports(lm) is not None], (
        "these refuse the model too"
    )


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_left_out_leave_no_trace_in_a_subset(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    editor = supported(method, lm)
    patch = compute(statistics_of, editor, lm, *EDITS)
    statistics = statistics_of(lm)
    if type(editor).subset is Editor.subset:  # refused as a whole
        with pytest.raises(EditError, match="revert all"):
            editor.subset(patch, [0, 2], statistics)
        return
    some = editor.subset(patch, [0, 2], statistics)
    again = editor.subset(load(save(patch)), [0, 2], statistics)
    assert {k: hash_tensor(v) for k, v in some.tensors().items()} == {
        k: hash_tensor(v) for k, v in again.tensors().items()
    }
    whole = editor.subset(patch, [0, 1, 2], statistics)
    assert {k: hash_tensor(v) for k, v in whole.tensors().items()} == {
        k: hash_tensor(v) for k, v in patch.tensors().items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_describes_itself_and_its_parameters(method: str) -> None:
    editor = METHODS[method]
    assert editor.name == method
    assert all((editor.title, editor.description, editor.source, editor.when, editor.cost, editor.family))
    for name, field in editor.schema(make("llama"))["properties"].items():
        assert field.get("description"), f"{method}.{name} has no description"
    with pytest.raises(ValueError, match="Extra inputs"):
        editor.params(no_such_parameter=1)


def answers(lm: LM) -> list[str]:
    trained_for(lm)
    return [g.text for g in lm.generate([lm.prompt(e.text) for e in EDITS], 6)]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_learns_from_the_probes_records_it(method: str, statistics_of: StatisticsOf) -> None:
    lm = make("llama")
    editor = supported(method, lm)
    probes = ("France has the capital", "The capital of Japan is")
    edit = EDITS[0].model_copy(
        update={"paraphrases": probes[:1], "neighbours": (Neighbour(prompt=probes[1]),)}
    )
    bare, patch = (compute(statistics_of, editor, lm, e, EDITS[1]) for e in (EDITS[0], edit))
    hashes = [{k: hash_tensor(v) for k, v in p.tensors().items()} for p in (bare, patch)]
    trained = trained_prompts(load(save(patch)))
    if hashes[0] != hashes[1]:
        assert trained.issuperset(probes)
    assert trained == editor.trained_prompts(patch, [edit, EDITS[1]], params_of(editor))
    if type(editor).subset is not Editor.subset:
        statistics = statistics_of(lm)
        without = trained_prompts(editor.subset(patch, [1], statistics))
        assert probes[0] not in without
        assert trained_prompts(editor.subset(patch, [0], statistics)) == frozenset(
            patch.info.get(TRAINED_ON, [[]])[0]
        )


@pytest.mark.parametrize("method", ["ft", "lora", "adalora", "ia3", "grace"])
def test_without_use_probes_they_are_not_trained_on(method: str) -> None:
    editor = METHODS[method]
    edit = EDITS[0].model_copy(
        update={"paraphrases": ("France has the capital",), "neighbours": (Neighbour(prompt="Rome is in"),)}
    )
    for use in (True, False):
        (trained,) = editor.trained_on([edit], editor.params(use_probes=use))
        assert ("France has the capital" in trained) is use
        assert ("Rome is in" in trained) is use
        assert edit.text not in trained
