"""How much work a call makes the model do: passes, rows, tokens, tensors and bytes hashed.

    python -m tests.counted

Seconds differ from machine to machine, these numbers do not: `tests/server/test_counted_work.py` holds them. A tiny
model with seeded weights is used, so every number repeats.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from editors import METHODS
from editors.model import precision
from editors.model.lm import hash_tensor
from server.facts.guard import Guard
from server.facts.queries import FactQuery
from server.request_context import RequestContext
from server.services import Services
from server.transaction import host
from tests.server.opened import FACTS, QUICK, open_services

MEMIT = {"max_steps": 3}
OFF = Guard(off=("all",))


@dataclass
class Work:
    """What the model did."""

    passes: int = 0  # of the last layer
    tokens: int = 0  # that the last layer computed, with padding
    rows: int = 0  # of whole passes of the model
    generated: int = (
        0  # rows of those that grow a cache: one for each token of an answer, and shared beginnings
    )
    tensors_hashed: int = 0
    bytes_hashed: int = 0


@contextmanager
def counted(services: Services) -> Iterator[Work]:
    """Counts what happens in this block."""
    work, lm = Work(), services.workspace.lm

    def layer(*args: Any, **kwargs: Any) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        work.passes += 1
        work.tokens += hidden.numel() // hidden.shape[-1]

    def model(*_: Any, **kwargs: Any) -> None:
        ids: Tensor = kwargs["input_ids"]
        work.rows += ids.shape[0]
        if kwargs.get("use_cache"):
            work.generated += ids.shape[0]

    def hashed(tensor: Tensor) -> str:
        work.tensors_hashed += 1
        work.bytes_hashed += tensor.nbytes
        return hash_tensor(tensor)

    with pytest.MonkeyPatch.context() as patched:  # not hooks: a model with hooks answers in another way
        for module, see in ((lm.layers[-1], layer), (lm.base_model, model)):
            patched.setattr(module, "forward", _seen(module.forward, see))
        patched.setattr(host, "hash_tensor", hashed)
        patched.setattr(precision, "bfloat16_is_fast", lambda: False)  # the same work on every processor
        yield work


def _seen(forward: Callable[..., Any], see: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        see(*args, **kwargs)
        return forward(*args, **kwargs)

    return call


def works() -> dict[str, Work]:
    """The work of one call of each kind, each on the model as the calls before have left it."""
    found: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as home:
        services = open_services(Path(home))

        def count(name: str, call: Callable[[], Any]) -> Any:
            with counted(services) as found[name]:
                return call()

        edit = services.edits.apply
        queries = [FactQuery(e.prompt, e.target, e.subject) for e in FACTS]
        try:
            count("check of three facts", lambda: services.facts.check(queries))
            (one,) = count("rome, one edit", lambda: edit([FACTS[0]], "rome", dict(QUICK), OFF)).edit_ids
            services.workspace.statistics.tokens = 200  # the moments themselves do not matter here
            services.workspace.prepare(METHODS["memit"], METHODS["memit"].params(), RequestContext())
            count("memit, a batch of two", lambda: edit(FACTS[1:], "memit", dict(MEMIT), OFF))
            count("audit of three edits", services.edits.audit)
            count("the same audit again", services.edits.audit)
            count("revert of one edit", lambda: services.edits.revert([one]))
            count("lora, one edit", lambda: edit([FACTS[0]], "lora", {"max_steps": 4}, OFF))
        finally:
            services.close()
    return found


if __name__ == "__main__":
    for name, work in works().items():
        sys.stdout.write(f"{name}: {asdict(work)}\n")
