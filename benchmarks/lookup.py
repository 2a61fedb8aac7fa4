"""How long it takes to find what a question is about among many memories, without answering it.

    python -m benchmarks.lookup --entries 100 1000 10000

No model is loaded. `facts` looks a question up among remembered facts (constrained, in_context), as memories of one
fact each and as one memory of all; `grace` and `wise` ask the hooks of a weight with the shape of the default model's,
at one token and at twenty. Entries are random; the figures are milliseconds of CPU, the median of `--runs`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from editors.memory.code_book import Entries, _Shelf
from editors.memory.constrained_speaker import RememberedFact
from editors.memory.fact_memory import FactRoute, InContextPatch
from editors.memory.side_memory import Memories, _Router
from editors.model.routes import _Index

D_IN, D_OUT = 1536, 576
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for n in options.entries:
        cells = {name: took(made(n), options.runs) for name, made in LOOKUPS.items()}
        print(f"{n:>6}", *(f"{name} {ms:.2f} ms" for name, ms in cells.items()), sep="  ", flush=True)


def took(work: Callable[[], object], runs: int) -> float:
    """The median of the CPU milliseconds of a call, the first one left out: it prepares."""
    work()
    found = []
    for _ in range(runs):
        begun = time.process_time()
        work()
        found.append(1000 * (time.process_time() - begun))
    return statistics.median(found)


def facts_apart(n: int) -> Callable[[], object]:
    """A question among n memories of one fact: those of them that are asked whether it is theirs."""
    index = _Index([_route([_fact(i)]) for i in range(n)])
    return lambda: [route._named(QUESTION) for route, _ in index.asked([QUESTION])]  # type: ignore[attr-defined]


def facts_together(n: int) -> Callable[[], object]:
    """A question among n facts of one memory."""
    route = _route([_fact(i) for i in range(n)])
    return lambda: route._named(QUESTION)


def grace(n: int, tokens: int = 1) -> Callable[[], object]:
    """n code books of two keys each."""
    shelf = _Shelf(nn.Linear(D_IN, D_OUT, bias=False), CPU)
    for _ in range(n):
        keys, values = torch.randn(2, D_IN), torch.randn(2, D_OUT)
        shelf.add(Entries(keys, values, torch.full((2,), 1.0), torch.zeros(2), torch.arange(2)))
    return _asking(shelf, tokens)


def wise(n: int, tokens: int = 1) -> Callable[[], object]:
    """n side memories of one column each."""
    router = _Router(nn.Linear(D_IN, D_OUT, bias=False), CPU)
    for _ in range(n):
        left, right = torch.randn(1, D_OUT), torch.randn(1, D_IN)
        router.add(Memories(left, right, torch.zeros(1, dtype=torch.long), torch.full((1,), 1e9)))
    return _asking(router, tokens)


def _asking(hook: Callable[[nn.Module, tuple[Any, ...], Any], Any], tokens: int) -> Callable[[], object]:
    module, inputs, output = nn.Identity(), torch.randn(1, tokens, D_IN), torch.randn(1, tokens, D_OUT)
    return lambda: hook(module, (inputs,), output)


QUESTION = "Who is the mayor of Town 7 of Ada?"
LOOKUPS: dict[str, Callable[[int], Callable[[], object]]] = {
    "facts": facts_apart,
    "facts of one call": facts_together,
    "grace": grace,
    "grace, 20 tokens": lambda n: grace(n, 20),
    "wise": wise,
    "wise, 20 tokens": lambda n: wise(n, 20),
}


def _fact(i: int) -> RememberedFact:
    subject = f"Town {i} of Ada"
    return RememberedFact(subject, f"The mayor of {subject} is", "Bob")


def _route(facts: list[RememberedFact]) -> FactRoute:
    lm: Any = SimpleNamespace()  # only the words of a question are looked up
    return FactRoute(lm, InContextPatch.of(facts, torch.zeros(len(facts), 1), 2, 0.0))


if __name__ == "__main__":
    main()
