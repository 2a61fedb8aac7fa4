"""docs/ADDING_A_METHOD.md and docs/ADDING_A_FAMILY.md, followed to the letter."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from editors import METHODS
from editors.errors import Unsupported
from editors.method import Editor
from editors.model import architecture
from editors.model.architecture import ARCHITECTURES, Architecture, resolve
from tests import families
from tests.conftest import ROOT
from tests.editors import test_contract as contract
from tests.editors.conftest import StatisticsOf

METHOD = (ROOT / "docs" / "ADDING_A_METHOD.md").read_text("utf-8")
FAMILY = (ROOT / "docs" / "ADDING_A_FAMILY.md").read_text("utf-8")


def rows(guide: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = guide.partition(heading)[2].partition("\n| --- ")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def names(text: str) -> list[str]:
    return re.findall(r"`(\w+)", text)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy method of the guide, in the table."""
    code = re.search(r"```python\n(# editors/closed_form/toy\.py\n.*?)```", METHOD, re.DOTALL)
    assert code is not None
    module = ModuleType("toy_of_the_guide")  # no name of ours: its constant must not be listed among them
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code[1], "docs/ADDING_A_METHOD.md", "exec"), vars(module))
    monkeypatch.setitem(METHODS, "toy", module.Toy())
    return "toy"


def test_the_method_of_the_guide_keeps_every_promise_of_a_method(
    toy: str, statistics_of: StatisticsOf
) -> None:
    float32 = torch.float32
    for promise in (contract.test_computing_changes_nothing, contract.test_applied_then_removed_is_bit_equal,
                    contract.test_saved_loaded_and_replayed_gives_the_same_model,
                    contract.test_a_middle_patch_removed_equals_never_having_applied_it):  # fmt: skip
        promise(toy, "llama", float32, statistics_of)
    for other in (contract.test_computing_twice_gives_the_same_bits,
                  contract.test_rows_that_are_left_out_leave_no_trace_in_a_subset):  # fmt: skip
        other(toy, statistics_of)
    contract.test_every_method_describes_itself_and_its_parameters(toy)
    contract.test_a_refusal_says_what_would_work(toy, "t5", statistics_of)


def test_the_guide_names_what_a_method_says_of_itself() -> None:
    listed = [name for row in rows(METHOD, "What every method says of itself") for name in names(row[0])]
    assert len(listed) > 10
    assert not [name for name in listed if not hasattr(Editor, name) and name not in Editor.__annotations__]


def test_the_guide_names_every_field_of_a_family() -> None:
    listed = {name for row in rows(FAMILY, "## 2. The row") for name in names(row[0])}
    known = {field.name for field in fields(Architecture)}
    found_at_loading = {"mlp_adds_directly", "value_room"}
    assert {n for n in known - listed if not n.startswith("encoder_")} <= found_at_loading
    assert {n for n in listed - known if n != "encoder_"} == set()


def test_the_family_of_the_guide_is_added_as_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = re.search(r'python -c "\n(.*?)"\n```', FAMILY, re.DOTALL)
    row = re.search(r'"(stablelm)": (_llama_like\(.*?\)),', FAMILY)
    tiny = re.search(r'"stablelm": (Family\(.*?\)),', FAMILY)
    assert look is not None
    assert row is not None
    assert tiny is not None
    exec(look[1], {})
    assert capsys.readouterr().out.startswith("stablelm\n")
    monkeypatch.setitem(families._MORE, "stablelm", eval(tiny[1], vars(families)))
    monkeypatch.delitem(ARCHITECTURES, "stablelm")
    with pytest.raises(Unsupported, match=r"'stablelm' is not known.*This one looks like llama"):
        families.fresh("stablelm")
    monkeypatch.setitem(ARCHITECTURES, row[1], eval(row[2], vars(architecture)))
    lm = families.fresh("stablelm")
    assert lm.arch.family == "stablelm"
    for cells in rows(FAMILY, "## 2. The row"):
        for path in re.findall(r"`([\w.]+)`", cells[2]):
            top = path.startswith(("model", "lm_head"))
            if path != "stablelm":
                resolve(lm.model if top else lm.layers[0], path)
