"""What a change on top of many active edits adds to the weights, counted."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import many_active
from editors.model.deltas import LowRank
from server.transaction.partial_sums import STEP
from tests.server.opened import weights

EDITS = 3 * STEP


def test_edits_come_and_go_on_top_of_many_without_adding_all_of_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[LowRank] = []
    really = LowRank.add_to
    monkeypatch.setattr(LowRank, "add_to", lambda delta, weight: (added.append(delta), really(delta, weight)))

    def count(work: Callable[[], object]) -> int:
        added.clear()
        work()
        return len(added)

    options = Namespace(model="tiny", models=None)
    services = many_active._opened(options, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EDITS):
        assert count(lambda: many_active._apply(services, 1, generator)) == 1
    ids = [edit.id for edit in services.workspace.active_edits]
    assert count(lambda: many_active._revert(services, ids[-2])) <= STEP + 2
    assert count(lambda: many_active._revert(services, ids[0])) == EDITS - 2
    live, hashed = weights(services), services.workspace.host.weights_hash
    services.close()

    again: list[many_active.Services] = []
    assert count(lambda: again.append(many_active._opened(options, tmp_path))) == EDITS - 2
    [services] = again
    assert services.workspace.damage == []
    assert services.workspace.host.weights_hash == hashed
    assert all(torch.equal(tensor, live[name]) for name, tensor in weights(services).items())
    services.close()
