"""What works on which family, found by trying it on tiny models; `python -m tests.families_table` writes the page.

A cell about methods lists those that refuse the family: `METHODS[...].supports`, whose word the contract tests check.
Loading, steering, tracing and export are done, here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors import METHODS
from editors.errors import EditError, Unsupported
from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams
from editors.locate.traced_rows import refused
from editors.method import EditContext
from editors.model.lm import LM
from editors.moments import Statistics
from server.models import loading
from server.settings import Settings
from server.transaction.host import ModelHost
from tests.editors.test_contract import EDITS, active, params_of
from tests.editors.test_steering import dose_of, logits, same, steered, vector_of
from tests.families import FAMILIES, MORE, QUANTISED, ROUTED, fresh, make, save_to

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
ALL = (*FAMILIES, *MORE, *ROUTED, *QUANTISED)
NO, YES = "–", "yes"
KINDS = {
    "closed_form": "closed form",
    "finetune": "fine-tuning",
    "learned": "trained editors",
    "memory": "memories",
}
INTRO = """\
<!-- Written by `python -m tests.families_table`, which tries every cell. Change the code, not this file. -->

# Families

What works on which family of models. A test tries it on a tiny random model of each family and fails when this table
says otherwise; how good an edit is on a real model, `calibrate_editing` measures. Names are those of the tests;
`-nf4` and `-int8` are models whose weights bitsandbytes quantises.

The columns: it *loads* and its row of facts is checked by numbers; edits *in closed form* (rome, memit, ...), by
*fine-tuning* (ft, lora, ...), by *trained editors* (mend, serac), as *memories* beside the weights (constrained,
grace, ...), with the methods that refuse the family; *steering* by a vector and off again to the bit; *tracing* where a
fact lies, with the methods that refuse the family; *export* of the edited model as a folder that loads and says the
same (adapters are another way, and the only one of quantised weights).

"""


def refusing(lm: LM, kind: str) -> list[str]:
    """The methods of a kind that refuse the model."""
    return [
        name for name, editor in METHODS.items() if editor.family == kind and editor.supports(lm) is not None
    ]


def methods(kind: str) -> Callable[[str], str]:
    """What a cell says about one kind of methods."""

    def cell(family: str) -> str:
        refused = refusing(make(family), kind)
        if len(refused) == sum(editor.family == kind for editor in METHODS.values()):
            return NO
        return f"yes, not {', '.join(refused)}" if refused else YES

    return cell


def loads(family: str) -> str:
    """Whether a folder of the family loads with the row that it has."""
    if family in QUANTISED:  # `make` loads it from a folder
        return YES if make(family).quantisation else NO
    with tempfile.TemporaryDirectory() as place:
        lm = _loaded(save_to(family, Path(place) / "model"), Path(place))
        return YES if alike(logits(lm), logits(make(family))) else NO


def steering(family: str) -> str:
    """Whether a vector changes what it says, and nothing stays of it."""
    lm = make(family)
    before = logits(lm)
    with steered(lm, dose_of("mood", vector_of(lm), 0.5)):
        moved = not same(logits(lm), before)
    return YES if moved and same(logits(lm), before) else NO


def tracing(family: str) -> str:
    """Whether it can be traced which states carry a fact."""
    try:
        attribution_patching(
            make(family), "The capital of France is", "France", None, TraceParams(samples=2), lambda *_: None
        )
    except (Unsupported, EditError):
        return NO
    return YES if refused(make(family)) is None else "yes, not causal_trace, knowledge_neurons"


def export(family: str) -> str:
    """Whether the edited model leaves as a folder that loads and says the same."""
    lm = fresh(family)
    if lm.quantisation is not None:  # its weights never change: an edit stands beside them
        return NO
    editor = METHODS["ft"]
    patch = editor.compute(lm, EDITS[:1], params_of(editor), EditContext(Statistics(Path("nowhere"), "none")))
    host = ModelHost(lm)
    host.set_stack([active(1, editor.name, patch)])
    edited = logits(lm)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "edited"
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        again = logits(_loaded(folder, Path(place)))
    return YES if alike(again, edited) and not alike(edited, logits(make(family))) else NO


def alike(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two models say the same. A mixture of experts adds in another order where its weights lie elsewhere."""
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(one, other, strict=True))


def _loaded(folder: Path, home: Path) -> LM:
    return loading.load(Settings(model=str(folder), home=home, device="cpu"), lambda *_: None)


COLUMNS: dict[str, Callable[[str], str]] = {
    "loads": loads,
    **{title: methods(kind) for kind, title in KINDS.items()},
    "steering": steering,
    "tracing": tracing,
    "export": export,
}


def row(family: str) -> str:
    """One line of the table."""
    return f"| {family} | {' | '.join(cell(family) for cell in COLUMNS.values())} |"


def page() -> str:
    """The page, every cell tried."""
    head = f"| family | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}\n"
    return INTRO + head + "\n".join(row(family) for family in ALL) + "\n"


def rows_of_page() -> dict[str, str]:
    """The lines of the page as it stands, by family."""
    lines: list[Any] = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
