"""A home that was compacted is replayed to the same weights, and what was given up says so when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from editors.edit import Edit
from server.errors import ServiceError
from store import GivenUp, Ledger
from tests.server.opened import FACTS, apply, open_services, same, weights


def test_a_compacted_home_has_the_same_weights_and_its_reverted_edits_come_back(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    ids = apply(services, *FACTS)
    given_up = apply(services, Edit(subject="Peru", prompt="The capital of {} is", target="Oslo"))
    all_of_them = weights(services)
    services.edits.revert(ids[:1])
    services.edits.revert([ids[1], *given_up])
    live, hashed = weights(services), services.workspace.host.weights_hash
    services.edits.reapply(ids[1:2])
    services.edits.revert(ids[1:2])
    services.close()
    with Ledger.open(tmp_path) as ledger:
        removed = ledger.compact(GivenUp(reverted_days=0)).removed
    assert removed.edit_ids == tuple(given_up)
    assert len(removed.former) == 1  # without the first edit; without both is live

    services = open_services(tmp_path)
    assert services.workspace.damage == []
    assert services.workspace.host.weights_hash == hashed
    assert same(weights(services), live)
    with pytest.raises(ServiceError, match=f"{given_up[0]} cannot come back: .*errata-mcp compact"):
        services.edits.reapply(given_up)
    assert "errata-mcp compact" in services.history.show_edit(given_up[0]).patch["deleted"]
    services.edits.reapply(ids[:2])
    back = weights(services)
    services.close()
    services = open_services(tmp_path / "again")
    apply(services, *FACTS)
    assert same(back, weights(services))
    assert not same(back, all_of_them)
    services.close()
