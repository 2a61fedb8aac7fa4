"""A server that works for weeks keeps no more than one that has worked for an hour."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from editors.edit import Edit
from editors.moments import Statistics
from editors.moments.statistics import FACTORS, MOMENTS
from server import memory
from server.facts import applying, auditing, measuring, previews
from server.facts.queries import FactQuery
from server.priority import keep_what_is_loaded
from server.services import Services
from tests.families import make
from tests.server.opened import QUICK, apply, open_services
from tests.server.processes import ROOT

OURS = ("editors.", "server.", "store.")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


def work(services: Services, number: int) -> None:
    """Another fact each time: asked, checked, previewed, applied in three ways, audited, taken back."""
    subject = f"Atlantis {number}"
    fact = Edit(
        subject=subject,
        prompt="The capital of {} is",
        target="Rome",
        paraphrases=(f"{subject} has the capital",),
    )
    services.facts.ask(fact.text, 3)
    services.facts.check([FactQuery(prompt=fact.text, expected=["Paris"])])
    services.edits.preview([fact], method="rome", params=QUICK)
    services.edits.revert(apply(services, fact))
    ids = services.edits.apply([fact], method="grace", params={"max_steps": 2}).edit_ids
    services.edits.audit()
    services.edits.revert(ids)


def held() -> Counter[str]:
    """Objects of our own classes, and tensors, that are alive."""
    gc.collect()
    kinds = (type(o) for o in gc.get_objects())
    return Counter(
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in kinds
        if issubclass(kind, torch.Tensor) or f"{kind.__module__}.".startswith(OURS)
    )


def test_what_is_held_does_not_grow_with_the_calls_that_were_made(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "MOST", 2)
    monkeypatch.setattr(auditing, "MOST_KEPT", 2)
    monkeypatch.setattr(measuring, "MOST_JUDGED", 2)
    for number in range(applying.MOST_BEFORE):  # until every store of latest things is full
        work(services, number)
    before = held()
    for number in range(applying.MOST_BEFORE, applying.MOST_BEFORE + 3):
        work(services, number)
    after = held()
    assert not after - before


def test_factors_of_second_moments_are_kept_in_bounded_number(tmp_path: Path) -> None:
    lm = make("llama")
    statistics = Statistics(tmp_path, "model", tokens=200)
    statistics.ensure(lm, range(lm.n_layers), lambda *_: None)
    first = statistics.metric(0, 0.001).cholesky
    for number in range(2 * FACTORS):  # an agent that tries one ridge after another
        statistics.metric(number % lm.n_layers, 0.01 + number)
        statistics.projector(number % lm.n_layers, 0.5 + number / 1000)
    assert (len(statistics._metrics), len(statistics._projectors)) == (FACTORS, FACTORS)
    assert len(statistics._moments) <= MOMENTS
    again = statistics.metric(0, 0.001).cholesky
    assert first is not None
    assert again is not None
    assert again is not first
    assert torch.equal(again, first)


def test_freed_memory_is_given_back_but_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        trims = 0

        def malloc_trim(self, pad: int) -> int:
            self.trims += 1
            return 1

    library, now = Library(), [100.0]
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tidy = memory.Tidy()
    for _ in range(100):
        tidy()
        now[0] += memory.REST / 10
    assert library.trims == 10


class Node:
    """Something that refers to itself, as an error's traceback does to what raised it."""

    def __init__(self) -> None:
        self.me = self


def test_work_on_the_model_leaves_no_cycles_for_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tidy = memory.Tidy()
    gc.disable()
    try:
        left = weakref.ref(Node())
        tidy()
        assert left() is not None, "a collection at every call would hold up reads"
        now[0] += memory.WHOLE
        tidy()
        assert left() is None
    finally:
        gc.enable()


def test_requests_that_come_and_go_make_no_collection_of_all_that_is_held() -> None:
    """Python's own settings make four whole ones here."""
    thresholds, whole = gc.get_threshold(), 0

    def count(phase: str, info: dict[str, int]) -> None:
        nonlocal whole
        whole += phase == "start" and info["generation"] == 2

    keep_what_is_loaded()
    gc.callbacks.append(count)
    try:
        held = [[Node()] for _ in range(200_000)]  # as 100 connections are
        assert len(held) == 200_000
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    assert whole == 0


def test_the_model_is_given_back_before_memory_is(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[bool] = []
    monkeypatch.setattr(
        services.workspace, "tidy", lambda: waiting.append(services.workspace.queue._current is not None)
    )
    services.facts.ask("The capital of France is", 2)
    assert waiting
    assert not any(waiting[-1:])


PRODUCTS = """
from server.memory import keep_flat
keep_flat()
import ctypes, threading, torch
from torch.nn.functional import linear
torch.set_num_threads(1)

class Counts(ctypes.Structure):
    _fields_ = [(f"n{i}", ctypes.c_size_t) for i in range(10)]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Counts
weight = torch.randn(48, 64, dtype=torch.bfloat16)
used = []

def products(first):
    for rows in range(first, first + 60):
        linear(torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True), weight).sum().backward()
    used.append(library.mallinfo2().n7 // 1_000_000)

for start in (1, 61, 121):
    products(start)
print(*used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own count of what is used")
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no products in bfloat16"
)
def test_products_of_ever_new_lengths_keep_no_more_memory() -> None:
    outside = {k: v for k, v in os.environ.items() if k not in memory.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, cwd=ROOT, env=outside
    )
    first, _, last = map(int, done.stdout.split())
    assert last - first < 10  # 60 MB more, without a bound on what PyTorch's layer above oneDNN keeps
