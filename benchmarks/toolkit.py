"""Fine-tuning beside EasyEdit's own code, on the same model, facts and layer: CPU seconds and what holds.

    python -m benchmarks.toolkit [--easyedit DIR] [-n 3]

`--easyedit` names a folder that holds the package `easyeditor`, for example an unpacked wheel of it. It is read from
there with its devices set to the CPU, and only its FT is loaded. ft is also compared with the
plain loop of FT-M (Zhang et al. 2024, arXiv 2401.01286): Adam on one MLP projection, every step a pass of the whole
model over the prompt and the target. All run in turn in one process, with one thread; measuring is not
timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.facts import load
from benchmarks.rome import _model as load_model
from editors import METHODS
from editors.edit import Edit
from editors.method import EditContext
from editors.model.deltas import Delta, Dense
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import join_deltas

STEPS, RATE = 25, 5e-4  # of FT-M, as EasyEdit's published settings have them for 7B models
NOT_RUN = ("easyeditor", "easyeditor.models", "easyeditor.util")  # packages whose own imports are not wanted

Change = Mapping[str, Sequence[Delta]]
"""What an edit adds to each weight."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    lm, home = load_model(options)
    facts = load("check")
    edits = [f.edit for f in facts[:: max(1, len(facts) // options.n)][: options.n]]
    editor = METHODS["ft"]
    params = editor.resolve(lm, editor.params())
    context = EditContext(Statistics(home, "none"))
    layer = params.layers[0]
    runs: dict[str, Callable[[Edit], Change]] = {
        "ft, ours": lambda edit: join_deltas([editor.compute(lm, [edit], params, context)]),
        "ft-m, plain loop": lambda edit: plain_ft(lm, layer, edit),
    }
    if options.easyedit is not None:
        toolkit = EasyEdit(lm, options.easyedit)
        runs["ft, EasyEdit"] = lambda edit: toolkit.run(layer, edit)
    rows: dict[str, list[tuple[float, bool]]] = {title: [] for title in runs}
    for edit in [e.model_copy(update={"paraphrases": (), "neighbours": ()}) for e in edits]:
        for title, run in runs.items():
            rows[title].append(_timed(lm, edit, run))
    print(f"{lm.name}, {len(edits)} facts, one thread")
    for title, found in rows.items():
        held = sum(h for _, h in found)
        print(
            f"{title:>22}: {statistics.median(s for s, _ in found):6.2f} CPU s, {held} of {len(found)} hold"
        )


def _timed(lm: LM, edit: Edit, run: Callable[[Edit], Change]) -> tuple[float, bool]:
    """CPU seconds of computing an edit, and whether the model answers with the target then."""
    start = time.process_time()
    change = run(edit)
    seconds = time.process_time() - start
    with lm.patched(change):
        return seconds, lm.score([(lm.prompt(edit.text), edit.target)])[0].rank == 0


def plain_ft(lm: LM, layer: int, edit: Edit) -> Change:
    """FT-M in its plainest form: the loss is that of the target's tokens, after the prompt."""
    name = lm.mlp_out(layer)
    weight: Any = lm.module(name).weight
    kept = weight.detach().clone()
    prompt = lm.prompt(edit.text, chat=False)
    ids, target = lm.encode(prompt)[0], lm.answer_ids(prompt, edit.target)
    inputs = torch.tensor([[*ids, *target]])
    with _trained(weight) as optimiser:
        for _ in range(STEPS):
            optimiser.zero_grad()
            logits = lm.model(input_ids=inputs).logits[0, len(ids) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
            if float(loss.detach()) < 1e-2:
                break
            loss.backward()
            optimiser.step()
        change = weight.detach() - kept
    with torch.no_grad():
        weight.copy_(kept)
    return {name: [Dense(change)]}


@contextmanager
def _trained(weight: Tensor) -> Iterator[torch.optim.Optimizer]:
    weight.requires_grad_(True)
    try:
        yield torch.optim.Adam([weight], lr=RATE)
    finally:
        weight.requires_grad_(False)
        weight.grad = None


class EasyEdit:
    """EasyEdit's FT from a folder, on the CPU."""

    def __init__(self, lm: LM, folder: Path) -> None:
        self.lm = lm
        if not any(isinstance(f, _OnCpu) for f in sys.meta_path):
            sys.meta_path.insert(0, _OnCpu(folder))
        base = lm.model.base_model_prefix
        self.names: dict[str, Any] = {
            "rewrite_module_tmp": lm.mlp_out(0).removesuffix(".weight").replace(".0.", ".{}."),
            "layer_module_tmp": f"{base}.layers.{{}}",
            "mlp_module_tmp": f"{base}.layers.{{}}.mlp",
            "attn_module_tmp": f"{base}.layers.{{}}.self_attn",
            "ln_f_module": f"{base}.norm",
            "lm_head_module": "lm_head",
            "device": 0,
            "model_name": "llama",
            "alg_name": "FT",
        }

    def run(self, layer: int, edit: Edit) -> Change:
        """The change that its FT makes; the model is as before afterwards."""
        main = importlib.import_module("easyeditor.models.ft.ft_main")
        request = {"prompt": edit.text, "subject": edit.subject, "target_new": edit.target}
        grads = [p.requires_grad for p in self.lm.model.parameters()]
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
                made = main.execute_ft(self.lm.model, self.lm.tokenizer, [request], self._ft(main, layer))
            return {n: [Dense(t.detach().clone())] for n, t in made.items()}
        finally:
            for p, flag in zip(self.lm.model.parameters(), grads, strict=True):
                p.requires_grad_(flag)
                p.grad = None

    def _ft(self, main: Any, layer: int) -> Any:
        steps = {"layers": [layer], "num_steps": STEPS, "lr": RATE, "weight_decay": 0, "kl_factor": 0}
        return main.FTHyperParams(**steps, norm_constraint=False, **self.names)


class _OnCpu(importlib.abc.MetaPathFinder):
    """Finds `easyeditor` in a folder, without the imports of its packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, *_: Any) -> Any:
        if name.partition(".")[0] != "easyeditor":
            return None
        place = self.folder.joinpath(*name.split("."))
        if name in NOT_RUN:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        inside = [str(place)] if place.is_dir() else None
        return importlib.util.spec_from_file_location(
            name, file, loader=_CpuSource(name, str(file)), submodule_search_locations=inside
        )


class _CpuSource(importlib.machinery.SourceFileLoader):
    def get_code(self, _: str) -> Any:
        text = Path(self.path).read_text("utf-8").replace("cuda:{hparams.device}", "cpu")
        return compile(text, self.path, "exec")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--easyedit", type=Path, help="folder with the package easyeditor")
    parser.add_argument("-n", type=int, default=3, help="facts, spread over check.json (default 3)")
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--home", type=Path, default=None, help="where model and statistics are kept")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
