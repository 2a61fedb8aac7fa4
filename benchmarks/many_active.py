"""What a change costs on top of many active edits: CPU seconds of apply, of a revert and of a start, without asking.

    python -m benchmarks.many_active [--model default] [--models FOLDER] [--edits 1000] [--tensors 1] [--home FOLDER]

The edits are random changes of rank one, tiny, so that only their number matters; they are recorded as any edit is.
With `--model tiny` a random model of the tests is used. `--whole METHOD` also applies a real fact by that method, with
everything that is asked for it, and takes it back: CPU seconds with none and with all, the least of three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from editors.edit import Edit
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import WeightPatch
from server.facts import editing
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import Startup
from server.transaction.stack import without
from server.transaction.transaction import Transaction
from store import Who

WHO = Who("benchmark", "1", None, None)
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, help="folder with converted models")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=1, help="weights that each edit changes")
    parser.add_argument("--whole", metavar="METHOD", help="also measure a whole apply_edits by this method")
    parser.add_argument("--home", type=Path, help="kept, and used again where it has the edits already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured(options, options.home or Path(scratch)), indent=1))


def measured(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """CPU seconds by what was done; `with none` beside `with all` where both can be."""
    services = _opened(options, home)
    generator = torch.Generator().manual_seed(len(services.workspace.active_edits))
    found: dict[str, Any] = {"edits": options.edits, "tensors": options.tensors}
    options.whole = getattr(options, "whole", None)

    def apply() -> None:
        _apply(services, options.tensors, generator)

    if not services.workspace.active_edits:
        found["whole with none"] = _whole(services, options.whole)
        found["apply with none"] = _best(apply)
    for _ in range(options.edits - len(services.workspace.active_edits)):
        apply()
    found["whole with all"] = _whole(services, options.whole)
    found["apply with all"] = _best(apply)
    ids = [edit.id for edit in services.workspace.active_edits]
    for name, place in (("first", 0), ("middle", len(ids) // 2), ("last", -1)):
        found[f"revert the {name}"] = round(_cpu(lambda place=place: _revert(services, ids[place])), 4)
        found[f"of that the weights, {name}"] = round(
            _cpu(lambda place=place: _stage(services, ids[place - 1 if place else 1])), 4
        )
    services.close()
    found["start"] = round(_cpu(lambda: _opened(options, home).close()), 3)
    return found


def _cpu(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _best(work: Callable[[], Any]) -> float:
    return round(min(_cpu(work) for _ in range(REPEATS)), 4)


def _opened(options: argparse.Namespace, home: Path) -> Services:
    settings = Settings(model=options.model, home=home, models=options.models, bounds="off")
    if options.model == "tiny":
        from store import Ledger
        from tests.families import fresh

        return Services.open(settings, fresh("llama"), Ledger.open(home), lambda *_: None)
    startup = Startup(settings)
    startup.begin()
    return asyncio.run(startup.services(RequestContext()))


def _apply(services: Services, tensors: int, generator: torch.Generator) -> None:
    workspace = services.workspace
    number = int(torch.randint(2**62, (1,), generator=generator))
    patch = WeightPatch(
        {
            name: _random(workspace.lm, name, generator)
            for name in map(workspace.lm.mlp_out, range(min(tensors, workspace.lm.n_layers)))
        }
    )
    request = {"subject": f"Town {number}", "prompt": f"Town {number} lies in", "target": "Rome"}
    with Transaction(workspace) as tx:
        staged = tx.add("rome", patch, 1)
        tx.commit_applied([tx.describe(staged, [request], {})], WHO)


def _random(lm: LM, name: str, generator: torch.Generator) -> LowRank:
    rows, columns = lm.weight(name).shape
    left = torch.randn(rows, 1, generator=generator) * 1e-4
    return LowRank(left, torch.randn(1, columns, generator=generator) * 1e-4)


def _whole(services: Services, method: str | None) -> float | None:
    """A real fact, applied with all that is asked for it; it is taken back each time, which is not counted."""
    if method is None:
        return None
    fact = Edit(subject="Uruguay", prompt="The capital of {} is", target="Salto")
    seconds = []
    for _ in range(4):  # the first time loads what is loaded once
        begun = time.process_time()
        report = services.edits.apply([fact], method=method)
        seconds.append(time.process_time() - begun)
        if report.status == "applied":
            services.edits.revert(report.edit_ids)
    return round(min(seconds[1:]), 3)


def _revert(services: Services, edit_id: str) -> None:
    """As the tool does it, without what the model is asked afterwards."""
    asked, editing.ask = editing.ask, lambda *_: {}  # type: ignore[assignment]
    try:
        services.edits.revert([edit_id])
    finally:
        editing.ask = asked  # type: ignore[assignment]


def _stage(services: Services, edit_id: str) -> None:
    workspace = services.workspace
    with Transaction(workspace) as tx:
        tx.stage(without(workspace, workspace.ledger.edits([edit_id])).stack)


if __name__ == "__main__":
    main()
